"""What every model declares: its options, the shared config keys that it reads, and how it reads histories."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from simgr_jax.errors import UserError

# Keys of `config.backbone` that shape a decoder trained from scratch; a checkpoint decides them itself.
SHAPE_KEYS = ("width", "layers", "heads", "kv_heads", "head_width", "mlp_width", "rope_theta", "norm_epsilon")
# Keys of `config.backbone` that say how any decoder is computed, also a checkpoint's.
COMPUTATION_KEYS = ("dropout", "dtype", "remat", "attention")


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The base of every model's `Options`, a frozen dataclass in the model's module.

    Its fields, with their defaults, are the config group `config.NAME`. Its class attributes declare the rest. An
    attribute that depends on an option may be a field or a property instead.

    Attributes:
      name: the model's name, also that of its module.
      history: "item", one position per item, or "tokens", one position per token of `inputs.prompts.Prompt`.
      windows: the training windows it learns from, one of `inputs.training_windows.WINDOWS`.
      reads_semantic_ids: whether it needs the catalog's semantic IDs. A model without them knows items by their index.
      backbone_keys: the keys of `config.backbone` that it reads when it is trained from scratch.
      takes_checkpoint: whether its backbone may be a Hugging Face checkpoint, also with `config.lora`.
      prompt_keys: the keys of `config.prompt` that it reads of a checkpoint's prompts.
      is_trained: whether it has parameters to train, and so reads `config.optimizer` and `config.training`.
    """

    name: ClassVar[str]
    history: ClassVar[str] = "item"
    windows: ClassVar[str] = "history"
    reads_semantic_ids: ClassVar[bool] = False
    backbone_keys: ClassVar[tuple[str, ...]] = ()
    takes_checkpoint: ClassVar[bool] = False
    prompt_keys: ClassVar[tuple[str, ...]] = ()
    is_trained: ClassVar[bool] = True

    @property
    def reads_item_texts(self) -> bool:
        """Whether it needs an LLM's readings of the items' texts (`config.item_reader`)."""
        return False

    @property
    def trains_item_reader(self) -> bool:
        """Whether this LLM is trained with the model."""
        return False

    def unread(self) -> dict[str, str]:
        """The model's own options without effect, given the others, each with the setting that would give it one."""
        return {}

    def require(self, holds: bool, key: str, remedy: str) -> None:
        """Checks an option.

        Args:
          holds: whether the option is valid.
          key: the option.
          remedy: what to do if it is not.

        Raises:
          UserError: the option is not valid.
        """
        if not holds:
            raise UserError(f"config.{self.name}.{key}: can't be {getattr(self, key)!r}; {remedy}")

    def require_choice(self, key: str, choices: tuple[str, ...]) -> None:
        """
        Raises:
          UserError: the option is not one of the choices.
        """
        self.require(getattr(self, key) in choices, key, f"choose one of {', '.join(choices)}")

    def require_label_smoothing(self) -> None:
        """
        Raises:
          UserError: `label_smoothing` is not in [0, 1).
        """
        self.require(0 <= self.label_smoothing < 1, "label_smoothing", "give a fraction from 0 to below 1, like 0.1")
