"""A pretrained model: the config and the weights of a folder in Hugging Face's layout, or of a GGUF file."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open

from simgr_jax.errors import UserError
from simgr_jax.huggingface import families, gguf_architectures, gguf_file
from simgr_jax.huggingface.first_layers import cut
from simgr_jax.huggingface.gguf_file import GgufFile
from simgr_jax.workdir.read_files import read_json_object, require_file

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_SINGLE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
# More than any model has, by key, and for every other number: vocabularies and positions are the largest. Transformers
# and the mapping of parameters make lists of some of these lengths from a config.
_MOST = {
    "num_hidden_layers": 10_000,
    "n_layer": 10_000,
    "num_experts": 10_000,
    "num_local_experts": 10_000,
    "num_labels": 100_000,
    "head_dim": 100_000,
    "partial_rotary_factor": 1,
    "rope_theta": math.inf,  # A base, not a size.
}
_MOST_OF_OTHERS = 2**24
_NOT_QUANTISED = "quantised weights are not supported, use the float32, float16 or bfloat16 checkpoint"


class Checkpoint:
    """A model's config, and its tensors, which are read on demand and in any slice.

    Attributes:
      path: a folder with config.json and model.safetensors, or the shards named in model.safetensors.index.json; or a
        GGUF file.
      config: the model's config, in Transformers' class for the model type.
      config_values: the values in config.json, or those that it would have.
    """

    path: Path
    config: PretrainedConfig
    config_values: dict[str, Any]

    def __init__(self, path: Path, first_layers: int = 0):
        """Reads the config and the file headers, but no weights. Never runs code that comes with a model.

        Args:
          first_layers: the config is that of a decoder of the first layers alone; 0 takes all.

        Raises:
          UserError: a file is missing or damaged, a folder's weights are quantised or not in safetensors files, or the
            model is not supported.
        """
        self.path = path
        self._tensors: Mapping[str, _Tensor]
        if path.is_file():
            file = gguf_file.read(path)
            self.config, self.config_values = _gguf_config(file)
            self._listing, self._tensors = path, gguf_architectures.tensors(file, self.config)
        else:
            self.config, self.config_values = _folder_config(path)
            self._listing, self._tensors = _read_headers(path)
        self.config, self.config_values = cut(self.config, self.config_values, first_layers)

    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def dtype(self, name: str) -> np.dtype:
        """The tensor's dtype; bfloat16 if it is quantized."""
        return _DTYPES[self._tensor(name).dtype]

    def require(self, name: str, shape: tuple[int, ...]) -> None:
        """
        Raises:
          UserError: there is no such tensor, or its shape is different, or its dtype is not supported.
        """
        tensor = self._tensor(name)
        if tensor.shape != shape:
            config = "its metadata" if self.path.is_file() else self.path / "config.json"
            raise UserError(
                f"{tensor.file}:{name}: has shape {list(tensor.shape)}, but {config} implies {list(shape)}; "
                "use the config and the weights of one model"
            )

    def read(self, name: str, index: tuple[slice, ...] = ()) -> Shaped[np.ndarray, "*S"]:
        """A tensor in its own dtype (for bfloat16, ml_dtypes'), or in float32 if it is quantized.

        Args:
          index: a slice of step 1 for each of the leading axes; only these bytes are copied.

        Raises:
          UserError: there is no such tensor, or its dtype is not supported.
        """
        return self._tensor(name).read(index)

    def read_rows(self, name: str, rows: Sequence[int]) -> Shaped[np.ndarray, "R D"]:
        """Like `read`, for the given rows of a matrix, in the given order.

        Raises:
          IndexError: there is no such row.
        """
        size = self.shape(name)[0]
        if any(not 0 <= row < size for row in rows):
            raise IndexError(f"{name}: rows {min(rows)} to {max(rows)} of {size}")
        return self._tensor(name).read_rows(rows)

    def _tensor(self, name: str) -> _Tensor:
        if name not in self._tensors:
            raise UserError(f"{self._listing}:{name}: the tensor is missing; use a checkpoint with all weights")
        tensor = self._tensors[name]
        if tensor.dtype not in _DTYPES:
            raise UserError(f"{tensor.file}:{name}: has dtype {tensor.dtype}; {_NOT_QUANTISED}")
        return tensor


class _Tensor(Protocol):
    """A tensor in a file, and its dtype in safetensors' spelling."""

    @property
    def file(self) -> Path: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def read(self, index: tuple[slice, ...]) -> Shaped[np.ndarray, "*S"]: ...
    def read_rows(self, rows: Sequence[int]) -> Shaped[np.ndarray, "R D"]: ...


class _Safetensor(NamedTuple):
    """The file is opened for each slice: until it is closed, its mapped pages count as this process's memory."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    def read(self, index: tuple[slice, ...]) -> Shaped[np.ndarray, "*S"]:
        with safe_open(self.file, framework="numpy") as file:
            return file.get_slice(self.name)[index or ...]

    def read_rows(self, rows: Sequence[int]) -> Shaped[np.ndarray, "R D"]:
        with safe_open(self.file, framework="numpy") as file:
            tensor = file.get_slice(self.name)
            return np.concatenate([tensor[row : row + 1] for row in rows])


def read_config(path: Path, first_layers: int = 0) -> PretrainedConfig:
    """The config of the model in a folder or a GGUF file, in Transformers' class for it.

    Args:
      first_layers: see `Checkpoint`.

    Code that comes with a model is never run.

    Raises:
      UserError: the config is missing or damaged, a folder's weights are quantised, or the model is not supported.
    """
    found = _gguf_config(gguf_file.read(path)) if path.is_file() else _folder_config(path)
    return cut(*found, first_layers)[0]


def _folder_config(folder: Path) -> tuple[PretrainedConfig, dict[str, Any]]:
    """The config, and the values in config.json."""
    from transformers import AutoConfig

    path = folder / "config.json"
    if not path.exists() and (files := sorted(folder.glob("*.gguf"))):
        raise UserError(f"{files[0]}: is a GGUF file; give the file instead of its folder")
    require_file(path, "give the folder of a Hugging Face model, or copy the model's config to it")
    values = read_json_object(path)
    families.require_supported(values.get("model_type"), path, values.get("architectures"))
    if values.get("quantization_config"):
        raise UserError(f"{path}:quantization_config: {_NOT_QUANTISED}")
    _check_numbers(values, path)
    with _rejections(path):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    families.require_supported(families.text_config(config).model_type, f"{path}:text_config")
    return config, values


def _gguf_config(file: GgufFile) -> tuple[PretrainedConfig, dict[str, Any]]:
    """As `_folder_config`; the values are those that a config.json would have."""
    from transformers import AutoConfig

    values = gguf_architectures.config_values(file)
    _check_numbers(values, file.path)
    with _rejections(file.path):
        return AutoConfig.for_model(**values), values


@contextlib.contextmanager
def _rejections(path: Path) -> Iterator[None]:
    """Transformers checks a config's values in many places and raises many kinds of exceptions.

    Raises:
      UserError: instead of any of them.
    """
    try:
        yield
    except Exception as error:
        reason = str(error)[:400]  # It may list all model types.
        raise UserError(f"{path}: Transformers rejects it ({reason}); copy it again from its source") from error


def _check_numbers(values: dict[str, Any], path: Path) -> None:
    """
    Raises:
      UserError: the config, or one within it, has a number that is not finite or larger than a model can have.
    """
    waiting: list[tuple[str, Any]] = [("", values)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += [(key, entry) for entry in value]
        elif isinstance(value, int | float):
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{path}:{key}: can't be {value}; copy the model's config again")
            if abs(value) > (most := _MOST.get(key, _MOST_OF_OTHERS)):
                raise UserError(f"{path}:{key}: can't be more than {most:,}; copy the model's config again")


def _read_headers(folder: Path) -> tuple[Path, dict[str, _Safetensor]]:
    """The file that lists the tensors, and each tensor's header entry."""
    single, index = folder / _SINGLE_FILE, folder / _INDEX
    if single.exists():
        return single, _read_header(single)
    if not index.exists():
        raise UserError(_no_weights(folder))
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index}:weight_map: does not map tensors to files; copy the file again from its source")
    for name in weight_map.values():
        # A hub's download has links, so the file that a name leads to says nothing.
        if name != Path(name).name or name == ".." or "\\" in name:
            raise UserError(f"{index}:weight_map: {name!r} is not a file's name; copy the file again from its source")
    shards = {name: _read_header(folder / name, index) for name in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise UserError(f"{index}:{name}: the tensor is not in {folder / shard}; copy both again from one source")
    return index, {name: shards[shard][name] for name, shard in weight_map.items()}


def _no_weights(folder: Path) -> str:
    pickles = sorted(file for pattern in ("pytorch_model*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickles:
        return (
            f"{pickles[0]}: is a pickle, which can run code when it is read; if you trust it, convert it to "
            "safetensors: transformers' AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    if any(folder.glob("model-*.safetensors")):
        return f"{folder / _INDEX}: no such file; copy it to the folder of the model's shards"
    return f"{folder / _SINGLE_FILE}: no such file; copy the model's safetensors weights to the folder of its config"


def _read_header(path: Path, index: Path | None = None) -> dict[str, _Safetensor]:
    require_file(path, f"copy it there ({index} lists it)" if index else "copy it there")
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, not a dict
            return {
                name: _Safetensor(path, name, tensor.get_dtype(), tuple(tensor.get_shape()))
                for name, tensor in slices.items()
            }
    except SafetensorError as error:
        # The dtype is a header's only enumerated value, so it must be the unknown one.
        if unknown := re.search(r"unknown variant `(.*?)`", str(error)):
            raise UserError(f"{path}: has a tensor of dtype {unknown[1]}; {_NOT_QUANTISED}") from error
        raise UserError(
            f"{path}: is not a complete safetensors file ({error}); copy or download it again (after a git clone, run "
            "`git lfs pull`)"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error}); check its permissions") from error
