"""A model's folder as Hugging Face lays it out: the config, and the weights in safetensors files."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open

from simgr_jax.errors import UserError
from simgr_jax.files import read_json_object, require_file

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_SINGLE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = ("F32", "F16", "BF16")
_NOT_QUANTISED = "quantised weights are not supported, give the float32, float16 or bfloat16 checkpoint"


def local_folder(name: str, key: str, *, weights: bool = True) -> Path:
    """The folder of a model, downloaded from the Hugging Face hub if `name` is an id there and no folder.

    Only JSON, text, sentencepiece models and safetensors are downloaded: never pickles, never code.

    Args:
      key: the config key that `name` is from.
      weights: whether its weights are wanted, or only what describes them.

    Raises:
      UserError: it is neither.
    """
    if (folder := Path(os.path.expanduser(name))).is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name,
                allow_patterns=["*.json", "*.txt", "*.model", *["*.safetensors"] * weights],
                ignore_patterns=["consolidated*"],  # Mistral's second copy of the weights.
            )
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{key}: no folder {name}, and no such model to be had from the Hugging Face hub; "
            "check the name (a gated model needs `hf auth login`), or give a folder"
        ) from error


class Checkpoint:
    """A model's config and its tensors, each read only when asked for, in any slice.

    Attributes:
      folder: with config.json and model.safetensors, or the shards that model.safetensors.index.json names.
      config: the model's config, of the class that Transformers has for it.
    """

    folder: Path
    config: PretrainedConfig

    def __init__(self, folder: Path):
        """Reads the config and the files' headers, no weights.

        Raises:
          UserError: a file is missing or damaged, the weights are quantised or no safetensors, or Transformers does
            not know the model. Code that comes with a model is never run.
        """
        self.folder = folder
        self.config = read_config(folder)
        self._listing, self._tensors = _read_headers(folder)

    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def require(self, name: str, shape: tuple[int, ...]) -> None:
        """
        Raises:
          UserError: there is no such tensor, it has another shape, or a dtype that is not read.
        """
        tensor = self._tensor(name)
        if tensor.shape != shape:
            raise UserError(
                f"{tensor.file}:{name}: has shape {list(tensor.shape)}, and by {self.folder / 'config.json'} should "
                f"have {list(shape)}; use the config and the weights of one model"
            )

    def read(self, name: str, index: tuple[slice, ...] = ()) -> Shaped[np.ndarray, "*S"]:
        """A tensor, in the file's dtype (bfloat16 is ml_dtypes' one).

        Args:
          index: a slice of step 1 for each of the leading axes; no other bytes are copied.

        Raises:
          UserError: there is no such tensor, or it has a dtype that is not read.
        """
        # Opened for each slice: pages of a mapped file count as this process's memory until it is closed.
        with safe_open(self._tensor(name).file, framework="numpy") as file:
            return file.get_slice(name)[index or ...]

    def read_rows(self, name: str, rows: Sequence[int]) -> Shaped[np.ndarray, "R D"]:
        """As `read`: rows of a matrix, in the order asked for.

        Raises:
          IndexError: there is no such row.
        """
        size = self.shape(name)[0]
        if any(not 0 <= row < size for row in rows):
            raise IndexError(f"{name}: rows {min(rows)} to {max(rows)} of {size}")
        with safe_open(self._tensor(name).file, framework="numpy") as file:
            tensor = file.get_slice(name)
            return np.concatenate([tensor[row : row + 1] for row in rows])

    def _tensor(self, name: str) -> _Tensor:
        if name not in self._tensors:
            raise UserError(f"{self._listing}:{name}: there is no such tensor; use a checkpoint with all weights")
        tensor = self._tensors[name]
        if tensor.dtype not in _DTYPES:
            raise UserError(f"{tensor.file}:{name}: has dtype {tensor.dtype}; {_NOT_QUANTISED}")
        return tensor


class _Tensor(NamedTuple):
    file: Path
    dtype: str
    shape: tuple[int, ...]


def read_config(folder: Path) -> PretrainedConfig:
    """The config of the model in `folder`, of the class that Transformers has for it.

    Raises:
      UserError: it is missing or damaged, the weights are quantised, or Transformers does not know the model. Code that
        comes with a model is never run.
    """
    from transformers import AutoConfig

    from simgr_jax.huggingface import families

    path = folder / "config.json"
    require_file(path, "give the folder of a Hugging Face model, or copy the model's config there")
    values = read_json_object(path)
    families.require_supported(values.get("model_type"), path)
    if values.get("quantization_config"):
        raise UserError(f"{path}:quantization_config: {_NOT_QUANTISED}")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    # Transformers checks a config's values in many places, each with its own kind of exception.
    except Exception as error:
        raise UserError(f"{path}: is refused by Transformers ({error}); copy the model's config again") from error


def _read_headers(folder: Path) -> tuple[Path, dict[str, _Tensor]]:
    """The file that lists the tensors, and where each is."""
    single, index = folder / _SINGLE_FILE, folder / _INDEX
    if single.exists():
        return single, _read_header(single)
    if not index.exists():
        raise UserError(_no_weights(folder))
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index}:weight_map: is not an object of tensors' files; copy the file again from its source")
    shards = {name: _read_header(folder / name, index) for name in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise UserError(f"{index}:{name}: the tensor is not in {folder / shard}; copy both again from one source")
    return index, {name: shards[shard][name] for name, shard in weight_map.items()}


def _no_weights(folder: Path) -> str:
    pickles = sorted(file for pattern in ("pytorch_model*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickles:
        return (
            f"{pickles[0]}: is a pickle, which may run code when read; convert it to safetensors where you trust it: "
            f"transformers' AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    if any(folder.glob("model-*.safetensors")):
        return f"{folder / _INDEX}: no such file; copy it beside the model's shards"
    return f"{folder / _SINGLE_FILE}: no such file; copy the model's weights, as safetensors, beside its config"


def _read_header(path: Path, index: Path | None = None) -> dict[str, _Tensor]:
    require_file(path, f"{index} names it: copy the shard there" if index else "copy it there")
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, it is no dict
            return {
                name: _Tensor(path, tensor.get_dtype(), tuple(tensor.get_shape())) for name, tensor in slices.items()
            }
    except SafetensorError as error:
        # Of what a header says, only a dtype is one of a set.
        if unknown := re.search(r"unknown variant `(.*?)`", str(error)):
            raise UserError(f"{path}: has a tensor of dtype {unknown[1]}; {_NOT_QUANTISED}") from error
        raise UserError(
            f"{path}: is not a whole safetensors file ({error}); copy or download it again (a git clone needs "
            "`git lfs pull`)"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error}); check its permissions") from error
