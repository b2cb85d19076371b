"""The loop: a Lightning Trainer that can also calibrate a language model, one block at a time."""

from __future__ import annotations

import copy
import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn

from plquant.block_checkpoint import SealedCheckpoints, keeping_steps
from plquant.block_module import BlockModule, RunProgress
from plquant.blocks.activations import Activations, at_once
from plquant.blocks.capture import capture_inputs
from plquant.blocks.errors import block_error, stream_errors
from plquant.blocks.prepare import prepare_blocks
from plquant.blocks.quant_block import QuantBlock
from plquant.blocks.stream_files import copy_of, pieces
from plquant.callbacks import BlockProgress
from plquant.data.base import TextData, ids_sha256, share_of
from plquant.distributed import launch, meeting, on_rank_zero, refused_by_any, require_even, require_supported, say
from plquant.finite import require_finite, require_finite_stream
from plquant.formats.quantization_config import FORMAT
from plquant.garbage import only_new
from plquant.manifest import add_to_hash, machine
from plquant.model import QuantizedLM
from plquant.nn.cost import Cost
from plquant.nn.packed_structure import PackedStructure
from plquant.perplexity_trainer import PerplexityTrainer
from plquant.plan import Plan, Run, output_range
from plquant.quant.grid import IntGrid
from plquant.quiet import interruptible, quiet, without_bar
from plquant.recipe import recipe, require_streamable, stream_bytes, trainer_entry
from plquant.report import BlockRecord, Report
from plquant.run_folder import RUNNING, RunFolder, running_of
from plquant.trial import try_block

SAME = 1e-5  # relative difference of two errors summed in another order
PRECISIONS = ("bf16-mixed", "32-true")


class BlockwiseTrainer(PerplexityTrainer):
    """A Lightning Trainer; ``calibrate`` fits each block of a language model with a fresh one of the same arguments.

    Args:
        max_epochs: Passes over the calibration samples, for each block.
        precision: ``bf16-mixed`` computes matmuls in bfloat16, what is learned stays in float32.
        devices: Processes, each with a device of its own and an equal share of the calibration samples; ``batch_size``
            is of each. On several nodes start the command with torchrun, and give ``num_nodes`` too.
        logger: Shared by all blocks.
        deterministic: Only algorithms that give the same bits each time on one machine. An operation that has none (on
            a GPU) is refused with true, named with ``warn``.
        block_parallel: Each of the processes fits blocks of its own, one in ``devices`` of them, from what the blocks
            before it give in full precision, on all samples. No process waits for another, and the result is that of
            one process in this mode; but a block does not make up for the errors of those before it.
        checkpoint_every: Steps between two checkpoints of the block being fitted, from which an interrupted run goes
            on; null takes none.
        activations: Where the activations between blocks are: in ``memory``, two or three times all calibration tokens,
            or on ``disk``, in files of the output folder that are gone with the run.
    """

    def __init__(
        self,
        *args: Any,
        max_epochs: int = 10,
        precision: Any = "bf16-mixed",
        devices: Any = 1,
        logger: Any = False,
        deterministic: Any = "warn",
        block_parallel: bool = False,
        checkpoint_every: int | None = 100,
        activations: Literal["memory", "disk"] = "memory",
        **kwargs: Any,
    ) -> None:
        if checkpoint_every is not None and checkpoint_every < 1:
            raise ValueError(f"--trainer.checkpoint_every={checkpoint_every} is no number of steps; null takes none")
        self.checkpoint_every, self.activations, self.block_parallel = checkpoint_every, activations, block_parallel
        kwargs.update(
            max_epochs=max_epochs, precision=precision, devices=devices, logger=logger, deterministic=deterministic
        )
        kwargs.update(enable_checkpointing=False, enable_model_summary=False, use_distributed_sampler=False)
        callbacks = kwargs.get("callbacks") or []
        callbacks = list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks]
        if kwargs.get("enable_progress_bar", True) and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(BlockProgress())
        kwargs["callbacks"] = callbacks
        # Snapshot before super().__init__: Lightning extends the list of callbacks it is given.
        self._block_arguments = {k: v if k == "logger" else copy.deepcopy(v) for k, v in kwargs.items()}
        self.run_config: str | None = None  # YAML that repeats the run; set by the command line
        if precision not in PRECISIONS:
            raise ValueError(
                f"--trainer.precision={precision}: what is learned stays in float32, and float16 overflows on massive "
                f"activations; use {' or '.join(PRECISIONS)}"
            )
        with quiet():
            super().__init__(*args, **kwargs)
        # A search for reads of memory that nothing wrote; it would cost 5% of a step.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        require_supported(self)

    def calibrate(
        self, model: QuantizedLM, datamodule: TextData, output_dir: str = "out", evaluate: bool = True
    ) -> Report:
        """Quantize a model block by block and write it to a folder.

        Every block sees two streams: what the full-precision blocks before it give (whose output is its target) and
        what the quantized ones give (its input). It is fitted, folded, packed, written, and passes its input on as it
        will run. Run again after an interruption, it goes on with the first unfinished block.

        Args:
            model: The model to quantize; it becomes the quantized model.
            datamodule: The calibration text.
            output_dir: Folder of the quantized model, new or empty or that of an interrupted run.
            evaluate: Measure perplexity in full precision, rounded to nearest, and calibrated, which runs as after
                `plquant.load`.
        """
        evaluate = evaluate and not self._block_arguments.get("fast_dev_run")
        grid, folder, done = self._check(model, datamodule, output_dir)
        if evaluate:
            share_of(datamodule.evaluation_text(model).windows, self.global_rank, self.world_size)
            if datamodule.text_name("validation") == datamodule.text_name("calibration"):
                say(f"note: perplexity is measured on the calibration text, {datamodule.text_name('validation')}")
        return launch(self, lambda: self._calibrate(model, datamodule, grid, folder, done, evaluate))

    @only_new()
    def _calibrate(
        self, model: QuantizedLM, datamodule: TextData, grid: IntGrid, folder: RunFolder, done: int, evaluate: bool
    ) -> Report:
        """In each of the processes, which are connected by now."""
        began, started = datetime.now(UTC), time.monotonic()
        done = self.strategy.broadcast(done)  # rank 0 has looked
        datamodule.trainer = self  # Lightning does this in validate; text sampled from the model wants the device now
        ids = on_rank_zero(self, lambda: datamodule.calibration_ids(model))
        if self._block_arguments.get("fast_dev_run"):  # one step per block
            ids = ids[: datamodule.batch_size * self._share[1]]
        if not self.block_parallel:
            require_even(self, len(ids))
        weights, digest = model.blocks, hashlib.sha256()
        with weights.on_demand():
            require_finite(model.lm, ids[:1], weights.named(), partial(add_to_hash, digest))
        folder.note_inputs(ids_sha256(ids), digest.hexdigest())
        on_rank_zero(self, lambda: folder.create(self.run_config))
        on_disk = folder.path if self.activations == "disk" else None
        probe = self._probe(model, grid)
        report = Report(model.checkpoint, probe.title, grid, model.activations)
        report.bytes_before = sum(p.numel() * p.element_size() for p in model.lm.parameters())
        for part in probe.parts:
            part.prepare(model.lm, ids)
        with weights.on_demand():
            blocks = prepare_blocks(model.lm, grid, ids, model.activations, model.blocks_per_fit, weights)
        if evaluate:
            with ExitStack() as stack:
                for block in blocks:
                    stack.enter_context(block.full_precision())
                report.perplexities["full precision"] = self._perplexity(model, datamodule, on_disk)
            report.perplexities["RTN"] = self._perplexity(model, datamodule, on_disk)
            report.nearest_cost = Cost.of(model.lm)

        rank, ranks = self._share
        with weights.on_demand():
            x_fp = capture_inputs(model.lm, list(blocks[0].layers.values()), ids[rank::ranks], folder=on_disk)
        progress = RunProgress(done, len(blocks), _seed(), folder.path / RUNNING, folder.recipe_sha256)
        if self.block_parallel:
            report.blocks = self._calibrate_apart(blocks, model, datamodule.batch_size, x_fp, folder, progress)
        x_q = copy_of(x_fp)
        for block in blocks if not self.block_parallel else ():
            with weights.held(*block.layers.values()):
                if block.index < done:
                    record = self._reload_block(block, folder, x_q, x_fp)
                else:
                    record = self._calibrate_block(block, model, datamodule.batch_size, x_q, x_fp, progress)
                    found = {"record": asdict(record), "structure": block.structure().as_dict()}
                    on_rank_zero(self, partial(folder.write_block, block.index, block.tensors(), found))
            self._moved(block, model, folder)
            report.blocks.append(record)
            say(record.line(len(blocks)))
        del x_fp, x_q

        report.bytes_after, stored = on_rank_zero(self, lambda: model.save_rest(folder, blocks))
        report.opens_in_stock = stored["format"] == FORMAT
        report.unquantized = stored["ignore"] + [f"{block.parent}.{name}" for block in blocks for name in block.kept]
        report.cost, report.num_blocks = Cost.of(model.lm), sum(len(block.layers) for block in blocks)
        report.axes = dict(Counter(grid.axis for block in blocks for grid in block.structure().grids.values()))
        if evaluate:
            model.lay_out(self.strategy.root_device)
            report.perplexities[report.title] = self._perplexity(model, datamodule, on_disk)
        report.seconds = time.monotonic() - started
        on_rank_zero(self, lambda: folder.write(report.write))
        made = {"recipe": folder.recipe, "machine": machine(), **report.made(began)}
        on_rank_zero(self, lambda: folder.finish(len(blocks), made))  # for every process that looks at it
        if self.is_global_zero:
            report.print()
        return report

    def plan(
        self, model: QuantizedLM, datamodule: TextData, output_dir: str | None = None, evaluate: bool = True
    ) -> Plan:
        """Say what a run of these options will take and give; loads no weights, writes nothing.

        Time and memory are those of one block of random weights, calibrated on a few samples.

        Args:
            model: The model to quantize.
            datamodule: The calibration text.
            output_dir: Folder that the run would write: what it would refuse to start in, or for, is refused here.
            evaluate: Of `calibrate`, whose options and files these are; evaluation is no part of the time.
        """
        if output_dir is not None:
            self._check(model, datamodule, output_dir)
        shapes, parameters = model.linear_shapes()
        grid = model.weights.resolve(shapes)
        method = self._probe(model, grid)
        title = Report(model.checkpoint, method.title, grid, model.activations).title
        fits, shares = model.num_fits(shapes), self._share[1]  # of the samples; or each process has some of the blocks
        samples, batch_size = datamodule.num_samples // shares, datamodule.batch_size
        run = Run(
            num_fits=fits,
            fits=-(-fits // self.world_size) if self.block_parallel else fits,
            samples=samples,
            batch_size=batch_size,
            epochs=(self.max_epochs or 1) if method.learnables() else 0,
            stream_bytes=stream_bytes(model, datamodule, method) // shares,
            on_disk=self.activations == "disk",
            streaming=model.streaming,
            processes=self.num_devices,
        )
        text = (samples, datamodule.seq_len, batch_size)
        fit = partial(self._try, model, batch_size)
        trial = try_block(model.sample(), grid, model.activations, *text, method.parts, fit)
        plan = Plan.of(shapes, parameters, grid, model.activations, model.load_dtype, method, run, trial)
        print("\n".join([f"{title} of {model.checkpoint}", *plan.lines()]))
        return plan

    def _try(
        self, model: QuantizedLM, batch_size: int, block: QuantBlock, x_q: Tensor, x_fp: Tensor, steps: L.Callback
    ) -> None:
        alone = {"devices": 1, "num_nodes": 1, "strategy": "auto"}
        quick = {"max_epochs": 1, "callbacks": [steps], "enable_progress_bar": False, "logger": False}
        trainer = BlockwiseTrainer(**self._block_arguments | alone | quick)
        trainer._calibrate_block(block, model, batch_size, x_q, x_fp, RunProgress(0, 1))

    def _calibrate_block(
        self, block: QuantBlock, model: QuantizedLM, batch_size: int, x_q: Tensor, x_fp: Tensor, progress: RunProgress
    ) -> BlockRecord:
        """Fit, fold and pack a block; both streams, [N, T, H], become its outputs."""
        started = time.monotonic()
        seed = progress.seed + block.index  # a block's own, so that a resumed run is the uninterrupted one
        L.seed_everything(seed, verbose=False)
        os.environ["PL_GLOBAL_SEED"] = str(progress.seed)  # seed_everything moved the run's
        with self._on_device(block):
            with block.full_precision():
                block.map_(x_fp, at_once(x_fp))
            refused_by_any(self._share[1], lambda: require_finite_stream(pieces(x_fp, 1), block.name))
            before = self._error(block, x_q, x_fp)
        kept = block.kept_layers()
        module = model.method(block)
        module.to(self.strategy.root_device)  # what its parts have made
        module.error_before, module.progress = max(before, 1e-12), progress
        tensors = [x_q, x_fp]
        if module.aug_loss:
            tensors.append(copy_of(x_q))
            with self._on_device(block), block.full_precision():
                block.map_(tensors[-1], at_once(x_q))
        activations = Activations(tuple(tensors), batch_size, seed, *self._share)
        reason = self._fit_and_fold(module, activations, x_q, x_fp, before)
        if reason:
            block.restore_(kept)
        with self._on_device(block):
            if reason:
                block.pack_()
            self._take_rank_zeros(block, kept)
            block.map_(x_q, at_once(x_q))
        block.put_away()
        errors = stream_errors(x_q, x_fp, self.strategy.root_device, self._share[1])
        unseen = [f"{block.parent}.{name}" for name in module.unseen]
        notes = [note for part in module.parts for note in part.notes]
        seconds = time.monotonic() - started
        made = (None, None) if reason else (module.equivalence, module.figures.get("condition number"))
        return BlockRecord(block.index, block.name, before, *errors, seconds, unseen, notes, reason, *made)

    def _calibrate_apart(
        self, blocks: list[QuantBlock], model: QuantizedLM, size: int, x: Tensor, folder: RunFolder, run: RunProgress
    ) -> list[BlockRecord]:
        """Fit blocks of this process's own, ``x`` [N, T, H] being what full precision gives; take the others' after."""
        meet, written = meeting(self), set()
        for block in blocks:
            mine = block.index % self.world_size == self.global_rank and not folder.has_block(block.index)
            with model.blocks.held(*block.layers.values()):
                if mine:
                    own = replace(run, checkpoint=folder.path / running_of(block.index))
                    record = self._calibrate_block(block, model, size, copy_of(x), x, own)
                    found = {"record": asdict(record), "structure": block.structure().as_dict()}
                    folder.write_block(block.index, block.tensors(), found)
                    written.add(block.index)
                    print(record.line(len(blocks)), flush=True)
                else:
                    with self._on_device(block), block.full_precision():
                        block.map_(x, at_once(x))
                    block.put_away()
            if mine:
                self._moved(block, model, folder)
        meet()
        records = []
        for block in blocks:
            tensors, found = folder.read_block(block.index)
            if block.index not in written:
                with model.blocks.held(*block.layers.values()):
                    block.load_(PackedStructure.from_dict(found["structure"]), tensors)
                self._moved(block, model, folder)
            records.append(BlockRecord(**found["record"]))
        return records

    @staticmethod
    def _moved(block: QuantBlock, model: QuantizedLM, folder: RunFolder) -> None:
        """A finished block's weights are those in its file."""
        for number, layer in block.layers.items():
            model.blocks.moved(layer, partial(folder.read_layer, block.index, f"{block.parent}.{number}."))

    def _take_rank_zeros(self, block: QuantBlock, kept: nn.ModuleDict) -> None:
        """Every process goes on with one and the same block, whatever the last bit of its own device's arithmetic."""
        if self._share[1] == 1:
            return
        own = block.structure().as_dict(), {name: tensor.cpu() for name, tensor in block.tensors().items()}
        structure, tensors = self.strategy.broadcast(own)
        if not self.is_global_zero:
            block.restore_(kept)
            block.load_(PackedStructure.from_dict(structure), tensors)

    def _fit_and_fold(
        self, module: BlockModule, activations: Activations, x_q: Tensor, x_fp: Tensor, before: float
    ) -> str:
        """Fit and fold a block; returns why the result is worse than rounding to nearest, or nothing if it is not."""
        try:
            try:
                self._fit(module, activations)
            except torch.linalg.LinAlgError:
                module.go_back_()  # to what was good before
            with self._on_device(module.block):  # Lightning has put it back on the CPU
                module.prove()
                module.fold()
                if not module.parts:
                    return ""  # it is rounding to nearest
                error = self._error(module.block, x_q, x_fp)
        except torch.linalg.LinAlgError as singular:
            return f"{module.title} met a matrix that it cannot solve ({str(singular).split('. ')[0]})"
        if error <= before * (1 + SAME):
            return ""
        return f"{module.title} had an error of {error:.3e}, where rounding to nearest has {before:.3e}"

    def _fit(self, module: BlockModule, activations: Activations) -> None:
        """Train a block's parameters, or, where there are none, only let it take its statistics."""
        arguments = {k: v if k == "logger" else copy.deepcopy(v) for k, v in self._block_arguments.items()}
        kept = self._keep_steps(module, arguments)
        with quiet(), interruptible():
            if self.block_parallel:
                arguments |= {"devices": 1, "num_nodes": 1, "strategy": SingleDeviceStrategy(self.strategy.root_device)}
                arguments |= {} if self.is_global_zero else without_bar(arguments)
            elif self.world_size > 1 and module.block.has_experts:  # some may have no token of a batch
                arguments["strategy"] = "ddp_find_unused_parameters_true"
            trainer = L.Trainer(**arguments | {"logger": self.loggers or False})
            module.activations = activations
            if module.learnables():
                trainer.fit(module, activations.shuffled(), ckpt_path=kept, weights_only=True)
            else:  # with no epoch to train, fit is refused under DDP
                trainer.limit_val_batches = 0
                trainer.validate(module, activations.in_order(), verbose=False)

    def _keep_steps(self, module: BlockModule, arguments: dict[str, Any]) -> Path | None:
        """Let a Trainer of these arguments keep its steps; the checkpoint to go on from, if there is one."""
        run = module.progress
        path = None if run is None else run.checkpoint
        if run is None or path is None or self.checkpoint_every is None or arguments.get("fast_dev_run"):
            return None
        sealed = SealedCheckpoints(path, {"run": run.recipe_sha256, "block": module.block.index})
        arguments |= keeping_steps(arguments, sealed, self.checkpoint_every)
        found = sealed.found() if self.block_parallel else on_rank_zero(self, sealed.found)
        if found is None:
            return None
        said = f"is not used, {found}; the fit begins anew" if found else "is there, the fit goes on from it"
        (print if self.block_parallel else say)(f"block {module.block.index + 1}: {path.name} {said}")
        return None if found else path

    def _reload_block(self, block: QuantBlock, folder: RunFolder, x_q: Tensor, x_fp: Tensor) -> BlockRecord:
        """Take a finished block from its file; both streams become its outputs."""
        tensors, found = folder.read_block(block.index)
        with self._on_device(block):
            with block.full_precision():
                block.map_(x_fp, at_once(x_fp))
            block.load_(PackedStructure.from_dict(found["structure"]), tensors)
            block.map_(x_q, at_once(x_q))
        block.put_away()
        return BlockRecord(**found["record"])

    def _check(self, model: QuantizedLM, datamodule: TextData, output_dir: str) -> tuple[IntGrid, RunFolder, int]:
        """Refuse what cannot work before any long work; the settled grid, the folder, and the blocks finished in it."""
        if model.is_quantized:
            raise ValueError(f"--model.checkpoint={model.checkpoint} is quantized already; give the original model")
        shapes, total = model.linear_shapes()
        grid = model.weights.resolve(shapes)
        probe = self._probe(model, grid)
        require_streamable(model, probe.parts)
        for axis in {axis for part in probe.parts for axis in part.axes}:
            replace(grid, axis=axis).resolve(shapes)
        decides = trainer_entry(self._block_arguments, self.num_devices, self.block_parallel)
        folder = RunFolder(output_dir, recipe(_seed(), model, datamodule, grid, probe, decides))
        rest = total - sum(o * i for o, i in shapes.values())
        _, size = output_range(shapes, grid, probe, rest, model.load_dtype)
        if datamodule.num_samples is not None and not self.block_parallel:
            require_even(self, datamodule.num_samples)
        streams = stream_bytes(model, datamodule, probe) if self.activations == "disk" else 0
        streams *= self.num_devices if self.block_parallel else 1
        done = folder.check(size + streams) if self.is_global_zero else 0
        title = Report(model.checkpoint, probe.title, grid, model.activations).title
        auto = " (group_size: auto)" if model.weights.group_size == "auto" else ""
        say(f"{title}{auto}: {len(shapes)} linear layers of {model.checkpoint} -> {output_dir}, {size / 2**20:.1f} MiB")
        if done:
            say(f"going on with block {done + 1}; the first {done} are finished there")
        return grid, folder, done

    def _probe(self, model: QuantizedLM, grid: IntGrid) -> BlockModule:
        """The method on a block of one linear: shows its name and options, and refuses wrong ones at once."""
        width = grid.group_size if isinstance(grid.group_size, int) else 8
        return model.method(QuantBlock({"0": nn.Linear(width, width)}, grid, activations=model.activations))

    @contextmanager
    def _on_device(self, block: QuantBlock) -> Iterator[None]:
        """The block on the trainer's device, where it stays, and in its precision."""
        block.to(self.strategy.root_device)
        with torch.no_grad(), self.strategy.precision_plugin.forward_context():
            yield

    def _error(self, block: QuantBlock, x: Tensor, target: Tensor) -> float:
        return block_error(block, x, target, self.strategy.root_device, self._share[1])

    @property
    def _share(self) -> tuple[int, int]:
        """Which of the shares of the samples this process has, and how many there are."""
        return (0, 1) if self.block_parallel else (self.global_rank, self.world_size)


def _seed() -> int:
    """Of ``seed_everything``, 0 if it was not called."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))
