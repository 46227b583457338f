"""The whole road of a run in a folder that is thrown away: config, data, shapes, one step, save, reload, generate.

What the run itself checks before it loads its base is checked first, as it is configured; then the step, without the
answers that a run gives before and after.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from minilora.backend import pick_device
from minilora.base import Base
from minilora.checkpoint.load import load_model
from minilora.config import RunConfig
from minilora.data.encode import Sample
from minilora.errors import UserError
from minilora.evaluate.answers import answer_samples, has_prompt
from minilora.memory import as_text, peak_bytes
from minilora.model import Mistral
from minilora.tokenizer import Tokenizer
from minilora.train.loop import fine_tune
from minilora.train.run_folder import refuse_output
from minilora.train.setup import Reporter, check_run
from minilora.train.signals import Stopped

COMPARED = 64  # tokens, by whose logits the reloaded model is known


def dry_run(config: RunConfig, reporter: Reporter, resume: bool = False, overwrite: bool = False) -> None:
    """Check what the run would; take one step, save, reload and generate, in a folder that is thrown away.

    Raises UserError for what would stop the run, and if what was saved does not come back bit for bit, and Stopped once
    a signal was followed. That the run could not have its `train.output` is only told. The checkpoint that it would go
    on from is not looked at.

    resume, overwrite: how the run would be begun
    """
    try:
        refuse_output(config, resume, overwrite)
    except UserError as error:
        reporter.say(f"warning: the run itself would be refused: {error}")
    reporter.say(f"memory of the run, its answers included: {as_text(sum(check_run(config).values()))} predicted")
    with tempfile.TemporaryDirectory() as folder:
        train = replace(config.train, output=folder, max_steps=1, warmup_steps=0)
        short = replace(config, train=train, eval=replace(config.eval, answers=0, samples=0))
        settled, tokenizer, sample, trained = _one_step(short, reporter)
        model = _reload(settled, Path(folder))
        reloaded = _logits(model, sample)
        if not torch.equal(trained, reloaded):
            difference = float((trained - reloaded).abs().max())
            raise UserError(f"the reloaded model's logits differ by up to {difference:.3g}: please report this bug")
        answers = answer_samples(model, tokenizer, [sample] if has_prompt(sample) else [], max_new_tokens=16)
        for answer in answers:
            reporter.say(f"{answer.prompt!r} is answered {answer.given!r}")
    done = f"a step, save, reload{', generate' if answers else ''}"  # raw text asks nothing
    unseen = "; the checkpoint to go on from was not looked at" if resume else ""
    reporter.say(f"dry run: config, data, memory, disk, {done} all work{unseen}; nothing was kept")


def _one_step(config: RunConfig, reporter: Reporter) -> tuple[RunConfig, Tokenizer, Sample, Tensor]:
    """Run it, and say what memory the step took. What is left: the configuration with what the base says, a sample, a
    conversation if there is one, and its logits. The model goes, since a second one need not fit beside it."""
    try:
        run = fine_tune(config, reporter, overwrite=True, with_test=False)
    except Stopped as stopped:
        raise Stopped("stopped; nothing was kept", stopped.exit_status - 128) from None
    peaks, predicted = run.memory.summary(), as_text(sum(run.predicted_bytes.values()))
    holes = "" if "device_allocated" in peaks else ", with what the heap and libraries keep for later"
    reporter.say(f"memory of the step: {predicted} predicted, {as_text(peak_bytes(peaks))} measured{holes}")
    sample = next(filter(has_prompt, run.train), run.train[0])
    return run.config, run.tokenizer, sample, _logits(run.model, sample)


@torch.no_grad()
def _logits(model: Mistral, sample: Sample) -> Tensor:
    """Logits of the sample's first tokens, (1, <= COMPARED, V) on the CPU."""
    logits: Tensor = model(torch.tensor([sample.tokens[:COMPARED].tolist()], device=model.device))
    return logits.cpu()


def _reload(config: RunConfig, folder: Path) -> Mistral:
    """The model from the files that the run wrote."""
    if config.train.base_learns:
        return load_model(folder / "model", dtype=torch.float32, device=pick_device(config.model.device))
    return Base.find(config.model, str(folder / "adapter")).load()
