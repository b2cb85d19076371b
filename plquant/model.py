"""A causal language model and the way it is quantized."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from plquant.architectures.moe import routers, unfuse_experts_
from plquant.block_module import BlockModule, Method, adamw
from plquant.blocks.capture import capture_calls, capture_inputs
from plquant.blocks.discovery import find_blocks
from plquant.blocks.quant_block import QuantBlock
from plquant.blocks.stand_in import StandIn
from plquant.blocks.weights import BlockWeights, give_, run_ahead
from plquant.perplexity import TokenNLL
from plquant.quant.grid import ActivationGrid, IntGrid
from plquant.run_folder import RunFolder
from plquant.sources import MALFORMED, Source

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


class QuantizedLM(L.LightningModule):
    """A causal language model and the way it is quantized.

    Weights are loaded when they are first needed, so that mistakes elsewhere show before.

    Args:
        checkpoint: Hub id, folder, .gguf file, a file inside an installed package (package:NAME/FILE), or the output
            folder of an earlier run.
        method: How each block is calibrated; `--model.method.help OmniQuant` shows the options of one.
        weights: Grid of integers the weights are rounded to.
        activations: What activations are rounded to as the model runs: inputs of linears, queries, keys, values; null
            leaves them in floating point.
        blocks_per_fit: Consecutive blocks that are fitted together, to the outputs of the last.
        dtype: Of activations and of weights that stay in floating point. ``auto`` keeps the checkpoint's, but bfloat16
            for float16 and .gguf, since float16 overflows on massive activations.
        trust_remote_code: Run Python code that comes with the checkpoint.
        optimizer: What fits the blocks, such as SignSGD, an optimizer of torch.optim, or one by its class path; each
            part gives its own learning rate. null is AdamW without decay.
        streaming: Hold the weights of one block at a time, read from safetensors when it is their turn: memory does not
            grow with the number of blocks, the result is the same. Takes more time where blocks are small, since each
            is read several times.
    """

    def __init__(
        self,
        checkpoint: str,
        method: Method,
        weights: IntGrid = IntGrid(),  # noqa: B008  frozen
        activations: ActivationGrid | None = None,
        blocks_per_fit: int = 1,
        dtype: Literal["auto", "bfloat16", "float32"] = "auto",
        trust_remote_code: bool = False,
        streaming: bool = False,
        optimizer: OptimizerCallable | None = None,
    ) -> None:
        super().__init__()
        if weights.axis == "out" and activations is not None and activations.bits is not None:
            raise ValueError(
                "--model.weights.axis=out gives each input channel scales of its own, inside the sum of a product of "
                f"integers: it does not go with --model.activations.bits={activations.bits}; use axis=in or bits=null"
            )
        if blocks_per_fit < 1:
            raise ValueError(f"--model.blocks_per_fit={blocks_per_fit} fits nothing; choose 1 or more blocks")
        self.checkpoint, self.weights, self.activations = checkpoint, weights, activations
        self._method, self._optimizer = method, optimizer or adamw
        self.blocks_per_fit = blocks_per_fit
        self.source = Source.find(checkpoint, trust_remote_code)
        self.config: PretrainedConfig = self.source.config()
        self.load_dtype = self._chosen_dtype(dtype)
        if streaming and (self.source.gguf_file is not None or self.is_quantized):
            kind = "a .gguf file" if self.source.gguf_file is not None else "quantized"
            raise ValueError(
                f"--model.streaming=true reads blocks one at a time from the safetensors of an original model, and "
                f"--model.checkpoint={checkpoint} is {kind}; leave it out"
            )
        self.streaming = streaming
        self.nll = TokenNLL()
        self._weights: BlockWeights | None = None
        self._known: tuple[Tensor, Tensor, StandIn] | None = None  # windows, outputs of the last block, its stand-in
        self._lm: PreTrainedModel | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def method(self, block: QuantBlock) -> BlockModule:
        """What calibrates a block, with the optimizer that fits it."""
        module = self._method(block)
        module.make_optimizer = self._optimizer
        module.optimizer_options()
        return module

    @property
    def is_quantized(self) -> bool:
        """The checkpoint is the output of an earlier run."""
        return getattr(self.config, "quantization_config", None) is not None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = self.source.tokenizer()
        return self._tokenizer

    @property
    def lm(self) -> PreTrainedModel:
        """The transformers model, loaded at first use."""
        self.configure_model()
        assert self._lm is not None
        return self._lm

    def configure_model(self) -> None:
        """Load the weights, once."""
        if self._lm is None and self.is_quantized:
            from plquant.packed_model import load

            self._lm = load(self.source.path, self.load_dtype, self.source.trust_remote_code)
        elif self._lm is None:
            loaded = (self.source.outline if self.streaming else self.source.load)(self.config, self.load_dtype)
            parent, layers = find_blocks(loaded)
            if self.streaming:
                give_(loaded, _tensors(self.source.load_part(self.config, self.load_dtype, parent)))
            unfuse_experts_(loaded)
            self._lm, self._weights = loaded, BlockWeights(parent, layers, self._read_block)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What DDP need not send from one process to the others: all of it, which each has from the same files.

        Codes laid out for kernels it could not send: gloo knows no int16.
        """
        return [name for named in (self.named_parameters, self.named_buffers) for name, _ in named()]

    @property
    def blocks(self) -> BlockWeights:
        """The decoder blocks of an original model and their weights: all of them, or those of one block at a time."""
        self.configure_model()
        assert self._weights is not None
        return self._weights

    @contextmanager
    def known_outputs(
        self,
        windows: Tensor,
        device: torch.device,
        precision: Callable[[], AbstractContextManager[None]],
        folder: Path | None = None,
    ) -> Iterator[None]:
        """Within it the blocks' outputs for these windows are known; each block was read once for all of them.

        Args:
            windows: int64 [N, T].
            device: Where they are worked out.
            precision: Within it the model computes as it will for the rest.
            folder: Where a file is to hold them; they are in memory if not given.
        """
        if not self.streaming:
            yield
            return
        layers = self.blocks.layers
        with precision(), self.blocks.on_demand():
            calls = capture_calls(self.lm, layers, windows[:1])
            x = capture_inputs(self.lm, layers, windows, batch_size=1, folder=folder)
            known = run_ahead(self.blocks, calls, x, device)
        self.lm.set_submodule(self.blocks.parent, nn.ModuleList(known))
        self._known = windows, x, known[-1]
        try:
            yield
        finally:
            self.lm.set_submodule(self.blocks.parent, layers)
            self._known = None

    def _read_block(self, number: int) -> dict[str, Tensor]:
        part = self.source.load_part(self.config, self.load_dtype, self.blocks.parent, number)
        unfuse_experts_(part)
        return _tensors(part.get_submodule(f"{self.blocks.parent}.{number}"))

    def lay_out(self, device: torch.device) -> None:
        """Let packed linears run by the kernels of this device, as ``plquant.load`` does; for good.

        Those of a streaming model do whenever they are read.
        """
        from plquant.packed_model import lay_out_

        if not self.streaming:
            lay_out_(self.lm, device)

    def linear_shapes(self) -> tuple[dict[str, tuple[int, int]], int]:
        """Full name of every linear in a block -> [O, I], and the number of all parameters; loads no weights."""
        with torch.device("meta"):
            skeleton = self._from_config(self.config)
        unfuse_experts_(skeleton)
        name, blocks = find_blocks(skeleton)
        kept = routers(blocks)
        shapes = {
            f"{name}.{path}": (module.out_features, module.in_features)
            for path, module in blocks.named_modules()
            if isinstance(module, nn.Linear) and path not in kept
        }
        return shapes, sum(parameter.numel() for parameter in skeleton.parameters())

    def sample(self) -> PreTrainedModel:
        """A model of random weights with no more blocks than are fitted together."""
        config = copy.deepcopy(self.config)
        text = config.get_text_config()
        text.num_hidden_layers = min(self.blocks_per_fit, text.num_hidden_layers)
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[: text.num_hidden_layers]
        lm = self._from_config(config)
        unfuse_experts_(lm)
        return lm.eval().requires_grad_(False)

    def _from_config(self, config: PretrainedConfig) -> PreTrainedModel:
        from transformers import AutoModelForCausalLM

        try:
            return AutoModelForCausalLM.from_config(
                config, dtype=self.load_dtype, trust_remote_code=self.source.trust_remote_code
            )
        except (*MALFORMED, RuntimeError) as error:
            raise ValueError(
                f"--model.checkpoint={self.checkpoint}: its config.json describes no model: {error!r}"
            ) from error

    def num_fits(self, shapes: Iterable[str]) -> int:
        """Number of runs of blocks that are fitted together, from the names of the linears in them."""
        numbers = {next(part for part in name.split(".") if part.isdigit()) for name in shapes}
        return -(-len(numbers) // self.blocks_per_fit)

    def save_rest(self, folder: RunFolder, blocks: Sequence[QuantBlock]) -> tuple[int, dict[str, Any]]:
        """Write all but the blocks: other tensors, config, tokenizer.

        Args:
            folder: The blocks are in it already.
            blocks: The packed blocks.

        Returns:
            Bytes of all files of tensors; the ``quantization_config`` that was written.
        """
        from plquant.packed_model import stored_config

        config = copy.deepcopy(self.lm.config)
        config.architectures = [type(self.lm).__name__]
        stored = config.quantization_config = stored_config(self.lm, self.activations)
        for beside in (config, self.lm.generation_config, self.tokenizer):
            folder.write(beside.save_pretrained)
        inside = set(name for block in blocks for name in block.tensors())
        tied = self.lm.all_tied_weights_keys  # stored once, under the name they are tied to
        rest = {k: t for k, t in self.lm.state_dict().items() if k not in inside and k not in tied}
        return folder.write_rest(rest), stored

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] -> logits [B, T, V]."""
        if self._known is not None:
            windows, outputs, last = self._known
            numbers = [int((windows == window).all(1).nonzero()[0]) for window in ids.to(windows.device)]
            last.output = outputs[numbers]
        return self.lm(ids, use_cache=False).logits

    def on_validation_epoch_start(self) -> None:
        """Forget the last evaluation."""
        self.nll.reset()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Take one batch of windows into the perplexity."""
        ids = batch[0] if isinstance(batch, list | tuple) else batch
        self.nll.update(self(ids), ids)

    def on_validation_epoch_end(self) -> None:
        """Log the mean negative log-likelihood."""
        self.log("nll", self.nll.compute().float())

    def _chosen_dtype(self, dtype: str) -> torch.dtype:
        if dtype != "auto":
            return getattr(torch, dtype)
        stored = self.config.dtype
        if isinstance(stored, str):
            stored = getattr(torch, stored)
        is_half = self.source.gguf_file is not None or stored == torch.float16
        return torch.bfloat16 if is_half else stored or torch.float32


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Its parameters and buffers; two names of one parameter have the same object."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
