"""Item embeddings from item text, or from a user's file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize
from sklearn.utils.extmath import randomized_svd
from threadpoolctl import threadpool_limits

from simgr_jax.errors import UserError
from simgr_jax.hub import local_folder
from simgr_jax.workdir.read_files import read_json, read_json_object

# The modules of sentence-transformers that a text encoder may have. None runs code that its files name, except Dense,
# whose activation function is checked.
_MODULES = ("Transformer", "Pooling", "Normalize", "Dense", "LayerNorm", "Dropout")
_DEFAULT_ACTIVATION = "torch.nn.modules.activation.Tanh"


def tfidf_svd(texts: Sequence[str], dim: int, seed: int) -> np.ndarray:
    """Latent semantic analysis: TF-IDF of words and of their character n-grams, reduced by a truncated SVD.

    Character n-grams (3 and 4 letters within words, the 30,000 most frequent) bring "moisturizer" and "moisturizing"
    together. Whole words keep rare names apart.

    Args:
      texts: [N], one text per item, which may be empty.
      dim: the number of singular vectors to keep; fewer if the texts have fewer.
      seed: of the randomized SVD.

    Returns:
      float32 [N, D], D <= dim, rows of unit length; an item whose text has no word gets a zero row.

    Raises:
      UserError: no text contains a word.
    """
    words = TfidfVectorizer(sublinear_tf=True, min_df=2 if len(texts) > 1000 else 1)
    characters = TfidfVectorizer(
        sublinear_tf=True, analyzer="char_wb", ngram_range=(3, 4), min_df=2, max_features=30_000
    )
    try:
        blocks = [words.fit_transform(texts), characters.fit_transform(texts)]
    except ValueError as error:  # scikit-learn: empty vocabulary
        raise UserError(
            "config.semantic_ids.embeddings.names: 'tfidf' finds no words in the items' texts; "
            "add item text, or use 'interactions'"
        ) from error
    matrix = scipy.sparse.hstack(blocks, format="csr", dtype=np.float32)
    with threadpool_limits(1):  # the result must not depend on the core count
        left, singular_values, _ = randomized_svd(matrix, min(dim, *matrix.shape), n_iter=2, random_state=seed)
    left[matrix.getnnz(axis=1) == 0] = 0  # the SVD leaves rounding errors there, which normalizing would blow up
    return normalize(left * singular_values).astype(np.float32)


def encode(texts: Sequence[str], model: str, batch_size: int) -> np.ndarray:
    """Sentence embeddings from a pretrained encoder.

    Args:
      texts: [N], one text per item, which may be empty.
      model: a folder or a Hugging Face id: a sentence-transformers model, or any Transformers encoder (its last
        hidden states are then mean-pooled). Weights must be safetensors; code that comes with a model is never run.
      batch_size: the number of texts encoded at once.

    Returns:
      float32 [N, D], rows of unit length; zero rows for empty texts.

    Raises:
      UserError: the optional packages are missing, or the model can't be found or isn't safe to load.
    """
    key = "config.semantic_ids.embeddings.encoder"
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise UserError(
            "config.semantic_ids.embeddings.names: 'text_encoder' needs optional packages; "
            "run `pip install simgr_jax[text]`"
        ) from error
    if not model:
        raise UserError(f"{key}: is empty; give a folder or a Hugging Face id, or use 'tfidf', which needs no model")
    folder = local_folder(model, key)
    _refuse_unsafe(folder)
    try:
        encoder = SentenceTransformer(
            str(folder), trust_remote_code=False, local_files_only=True, model_kwargs={"use_safetensors": True}
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{key}: {model} is not a text encoder ({error}); give another model") from error
    embeddings = encoder.encode(
        list(texts), batch_size=batch_size, convert_to_numpy=True, normalize_embeddings=True, show_progress_bar=False
    ).astype(np.float32)
    embeddings[[not text.strip() for text in texts]] = 0
    return embeddings


def _refuse_unsafe(folder: Path) -> None:
    """Raises UserError if loading `folder` would unpickle weights or run the model's own code."""
    key = "config.semantic_ids.embeddings.encoder"
    if not any(folder.rglob("*.safetensors")):
        raise UserError(f"{key}: {folder} has no safetensors weights; convert them, or give another model")
    for weights in folder.rglob("pytorch_model*.bin"):
        if not any(weights.parent.glob("*.safetensors")):
            raise UserError(f"{key}: {weights} is a pickle without safetensors beside it; convert it to safetensors")
    modules = folder / "modules.json"
    if modules.exists():
        _check_modules(folder, modules)


def _check_modules(folder: Path, listing: Path) -> None:
    """
    Raises:
      UserError: a module of the model is not among those known to run no code that its files name, or is not in its
        folder.
    """
    modules = read_json(listing)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise UserError(f"{listing}: is not a list of modules; copy it again from its source")
    for module in modules:
        kind, path = str(module.get("type")), str(module.get("path"))
        if not kind.startswith("sentence_transformers.") or kind.split(".")[-1] not in _MODULES:
            known = ", ".join(_MODULES)
            raise UserError(f"{listing}: module {kind} could run the model's own code; give a model of {known}")
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise UserError(f"{listing}: module {path} is outside the model's folder; give another model")
        if kind.endswith(".Dense"):
            config = folder / path / "config.json"
            activation = str(read_json_object(config).get("activation_function", _DEFAULT_ACTIVATION))
            # sentence-transformers imports whatever is named here.
            if not activation.startswith("torch.nn.modules."):
                raise UserError(f"{config}:activation_function: {activation} is not PyTorch's; give another model")


def load_npy(path: Path, num_items: int) -> np.ndarray:
    """Reads embeddings from a `.npy` file with one row per item, in catalog order (`Dataset.item_ids`).

    Returns:
      float32 [N, D], not normalized.

    Raises:
      UserError: the file is missing or not an array of N rows of finite numbers.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: can't be read as a .npy array ({error}); write it with numpy.save") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise UserError(f"{path}: is not an array of numbers; write a float array with numpy.save")
    if array.ndim != 2 or array.shape[1] == 0:
        raise UserError(f"{path}: has shape {array.shape}; write an array of shape [items, dimensions]")
    if len(array) != num_items:
        raise UserError(f"{path}: has {len(array)} rows for {num_items} items; write one per item, in catalog order")
    array = array.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if len(bad):
        raise UserError(f"{path}: row {bad[0]} has NaN or infinite values ({len(bad)} such rows); recompute them")
    return array
