"""A Lightning Trainer whose ``validate`` measures perplexity."""

from __future__ import annotations

from pathlib import Path

import lightning as L

from plquant.bfloat16 import quick_products
from plquant.data.base import TextData, share_of
from plquant.distributed import say
from plquant.files import write_json
from plquant.model import QuantizedLM
from plquant.perplexity import PerplexityResult
from plquant.quiet import interruptible, quiet
from plquant.tasks import lines, load_tasks, measure


class PerplexityTrainer(L.Trainer):
    """A Lightning Trainer that measures language models."""

    def validate(  # type: ignore[override]
        self,
        model: QuantizedLM,
        datamodule: TextData,
        result_file: str = "perplexity.json",
        baseline: str | None = None,
        tasks: str | None = None,
        task_data: str | None = None,
        task_limit: int | None = None,
    ) -> PerplexityResult:
        """Measure perplexity, print it and write it as JSON with the protocol it was measured under.

        Windows do not overlap, every token but the first of each window counts, the incomplete last window is dropped.

        Args:
            model: The model to measure.
            datamodule: The text.
            result_file: JSON file to write.
            baseline: JSON file of an earlier measurement to compare with; refused if its protocol differs.
            tasks: Names of lm-eval, such as piqa,arc_easy, or its YAML files: their accuracy is measured too.
            task_data: Folder with a file for each task (piqa.jsonl); null takes their data from the hub.
            task_limit: Of each task answer the first so many questions; null answers all.
        """
        protocol = datamodule.evaluation_text(model).protocol
        earlier = None if baseline is None else PerplexityResult.read(baseline)
        if earlier is not None:  # refuse now what would not compare, not after the work
            PerplexityResult(model.checkpoint, 0.0, self._precision_of(model), protocol).check_compares(earlier)
        if not Path(result_file).absolute().parent.is_dir():
            raise ValueError(f"--result_file={result_file}: there is no such folder")
        asked = None if tasks is None else load_tasks(model, tasks, task_data, self.world_size)
        result = self._perplexity(model, datamodule)
        accuracy = {}
        if asked is not None:
            with self.strategy.precision_plugin.forward_context():
                accuracy = measure(model, *asked, self.strategy.root_device, datamodule.batch_size, task_limit)
        if self.is_global_zero:
            write_json(Path(result_file), result.as_dict() | ({"tasks": accuracy} if accuracy else {}))
        say(f"{result.line()}; written to {result_file}")
        if earlier is not None:
            say(result.compare(earlier).line(earlier))
        for line in lines(accuracy):
            say(line)
        return result

    def _perplexity(self, model: QuantizedLM, datamodule: TextData, folder: Path | None = None) -> PerplexityResult:
        windows = share_of(datamodule.evaluation_text(model).windows, self.global_rank, self.world_size)
        context, device = self.strategy.precision_plugin.forward_context, self.strategy.root_device
        known = model.known_outputs(windows, device, context, folder)
        with quick_products(device), quiet(), interruptible(), known:
            super().validate(model, datamodule=datamodule, verbose=False)
        protocol = datamodule.evaluation_text(model).protocol
        asked = protocol["tokens"] - protocol["windows"]  # all but the first token of every window
        if (seen := model.nll.seen()) != asked:
            raise ValueError(
                f"{seen} of {asked} tokens were measured: a perplexity is that of the whole text "
                "asked for. Leave out --trainer.limit_val_batches and --trainer.fast_dev_run; use --data.eval_windows."
            )
        nll, precision = model.nll, self._precision_of(model)
        return PerplexityResult(model.checkpoint, float(nll.compute()), precision, protocol, nll.windows())

    def _precision_of(self, model: QuantizedLM) -> str:
        return f"{str(model.load_dtype).removeprefix('torch.')}, {self.precision}"
