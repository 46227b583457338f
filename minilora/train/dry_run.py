"""The whole road of a run in a folder that is thrown away: config, data, shapes, one step, save, reload, generate."""

import tempfile
from dataclasses import replace

import torch

from minilora.checkpoint.adapter import load_adapter
from minilora.checkpoint.load import load_model
from minilora.config import RunConfig
from minilora.errors import UserError
from minilora.evaluate.answers import answer_samples, has_prompt
from minilora.memory import as_text
from minilora.model import Mistral
from minilora.train.loop import fine_tune
from minilora.train.setup import Reporter, Run


def dry_run(config: RunConfig, reporter: Reporter) -> None:
    """Raises UserError for what would stop the run, and if what was saved does not come back bit for bit."""
    with tempfile.TemporaryDirectory() as folder:
        short = replace(
            config,
            train=replace(config.train, output=folder, max_steps=1, warmup_steps=0),
            eval=replace(config.eval, answers=0, samples=0),
        )
        run = fine_tune(short, reporter, overwrite=True, with_test=False)
        peaks, predicted = run.memory.summary(), as_text(sum(run.predicted_bytes.values()))
        measured = as_text(peaks.get("device_allocated", peaks["private"]))
        holes = "" if "device_allocated" in peaks else ", with what the heap and libraries keep for later"
        reporter.say(f"memory of the step: {predicted} predicted, {measured} measured{holes}")
        model = _reload(run)
        tokens = torch.tensor([run.train[0].tokens[:-1].tolist()], device=model.device)
        with torch.no_grad():
            trained, reloaded = run.model(tokens), model(tokens)
        if not torch.equal(trained, reloaded):
            difference = float((trained - reloaded).abs().max())
            raise UserError(f"the reloaded model's logits differ by up to {difference:.3g}: please report this bug")
        chats = [sample for sample in run.train if has_prompt(sample)][:1]
        for answer in answer_samples(model, run.tokenizer, chats, max_new_tokens=16):
            reporter.say(f"{answer.prompt!r} is answered {answer.given!r}")


def _reload(run: Run) -> Mistral:
    """The model from the files that the run wrote."""
    config, dtype, device = run.config, run.model.dtype, run.model.device
    if config.train.base_learns:
        return load_model(run.folder.path / "model", dtype=dtype, device=device)
    base = load_model(
        config.model.path, quantize=config.quantize, double_quant=config.model.double_quant, dtype=dtype, device=device
    )
    return load_adapter(base, run.folder.path / "adapter").eval()
