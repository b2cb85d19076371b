"""Token ids made elsewhere and used as they are, so that two programs see exactly the same tokens."""

# Letters: N num_samples, S seq_len, n evaluation windows, T eval_seq_len.

import os
from typing import Any

import torch
from torch import Tensor

from plquant.data.base import Split, TextData


class TokenIds(TextData):
    """Token ids in a safetensors file, used as they are; nothing is tokenized or drawn.

    Args:
        file: Path of the safetensors file. Its tensors are [windows, tokens] of any integer type.
        calibration_key: Name of the tensor with the calibration windows.
        validation_key: Name of the tensor with the evaluation windows.
        num_samples: Calibration windows to take, from the first on; null takes all the file has.
        seq_len: Width the calibration windows must have, in tokens; null takes the file's.
        eval_seq_len: Width the evaluation windows must have, in tokens; null takes the file's.
    """

    def __init__(
        self,
        file: str,
        calibration_key: str = "calibration_ids",
        validation_key: str = "evaluation_ids",
        num_samples: int | None = None,
        seq_len: int | None = None,
        eval_seq_len: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.file, self.calibration_key, self.validation_key = file, calibration_key, validation_key
        rows, width = self._shape("calibration_key", calibration_key)
        _, eval_width = self._shape("validation_key", validation_key)
        self._require_width("seq_len", seq_len, width, calibration_key)
        self._require_width("eval_seq_len", eval_seq_len, eval_width, validation_key)
        super().__init__(
            num_samples=rows if num_samples is None else num_samples, seq_len=width, eval_seq_len=eval_width, **kwargs
        )
        if self.num_samples > rows:
            raise ValueError(
                f"--data.num_samples={num_samples} windows were asked for, but {calibration_key} in {file} has {rows}; "
                f"use --data.num_samples={rows} or less, or leave it out to take all of them."
            )
        self.save_hyperparameters()

    def text(self, split: Split) -> str:
        """There is none."""
        raise NotImplementedError("TokenIds has token ids and no text; use calibration_ids or evaluation_text.")

    def text_name(self, split: Split) -> str:
        """The file and the tensor."""
        key = self.calibration_key if split == "calibration" else self.validation_key
        return f"{os.path.basename(self.file)}[{key}]"

    def calibration_ids(self, model: Any) -> Tensor:
        """The first N rows, [N, S] int64."""
        return self._read(self.calibration_key, model)[: self.num_samples].clone()

    def evaluation_windows(self, model: Any) -> Tensor:
        """The rows of the validation tensor, [n, T] int64."""
        return self._read(self.validation_key, model)

    def _read(self, key: str, model: Any) -> Tensor:
        with self._open() as tensors:
            ids = tensors.get_tensor(key).to(torch.int64)
        vocabulary = vocabulary_size(model)
        if ids.min() < 0 or ids.max() >= vocabulary:
            raise ValueError(
                f"{key} in --data.file={self.file} has ids from {ids.min()} to {ids.max()}, but the model's vocabulary "
                f"has 0 to {vocabulary - 1}; make the ids with this model's tokenizer."
            )
        return ids

    def _open(self) -> Any:
        from safetensors import SafetensorError, safe_open

        if not os.path.isfile(self.file):
            raise ValueError(f"--data.file={self.file} does not exist, a safetensors file is needed; check the path.")
        try:
            return safe_open(self.file, "pt")
        except SafetensorError as error:
            raise ValueError(
                f"--data.file={self.file} is not a safetensors file ({error}); "
                "write one with safetensors.torch.save_file, or use --data FileText for text."
            ) from error

    def _shape(self, flag: str, key: str) -> tuple[int, int]:
        with self._open() as tensors:
            if key not in tensors.keys():
                raise ValueError(
                    f"--data.{flag}={key} is not in {self.file}, which has "
                    f"{', '.join(tensors.keys()) or 'no tensors'}; name one of these."
                )
            stored = tensors.get_slice(key)
            shape, dtype = stored.get_shape(), stored.get_dtype()
        if len(shape) != 2 or 0 in shape or not dtype.startswith(("I", "U")):
            raise ValueError(
                f"--data.{flag}={key} in {self.file} is {dtype} {shape}; token ids [windows, tokens] of integer type "
                "are needed; save them that way."
            )
        return shape[0], shape[1]

    def _require_width(self, flag: str, given: int | None, width: int, key: str) -> None:
        if given is not None and given != width:
            raise ValueError(
                f"--data.{flag}={given}, but the windows of {key} in {self.file} have {width} tokens and are used as "
                f"they are; use --data.{flag}={width} or leave it out."
            )


def vocabulary_size(model: Any) -> int:
    """Ids the model can embed (the embedding may have more rows than the tokenizer has tokens)."""
    config = getattr(model, "config", None)
    return len(model.tokenizer) if config is None else config.get_text_config().vocab_size
