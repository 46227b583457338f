"""A base to be used: what the command line names, with an adapter or without, found and checked before it is loaded."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import torch

from minilora.backend import pick_device, pick_dtype
from minilora.checkpoint.adapter import CONFIG, read_adapter, read_adapter_config
from minilora.checkpoint.load import load_model
from minilora.checkpoint.mistral_adapter import is_mistral
from minilora.checkpoint.open import Checkpoint, open_checkpoint
from minilora.checkpoint.provenance import check_origin, read_provenance, recipe
from minilora.config import BaseConfig, LoraConfig, PrefixConfig
from minilora.data.records import data_fingerprint
from minilora.errors import UserError
from minilora.memory import DenseDtype, StepPlan, as_text, free_bytes, predict, private_bytes
from minilora.model import Mistral
from minilora.tokenizer import OLD_HF, Tokenizer, load_tokenizer

UNNAMED = ""  # a path: the adapter names its base, and without an adapter it is "demo"


@dataclass(frozen=True)
class Base:
    """A checkpoint and its tokenizer, and how its weights are to be loaded.

    scaling: of an adapter of mistral-finetune; added: what the adapter configures; warnings: what is to be said of it
    """

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    quantize: Literal["nf4"] | None
    double_quant: bool
    dtype: torch.dtype
    device: torch.device
    adapter: str | None
    scaling: float | None = None
    added: LoraConfig | PrefixConfig | None = None
    warnings: tuple[str, ...] = ()

    @staticmethod
    def find(
        config: BaseConfig, adapter: str | None = None, *, scaling: float | None = None, force: bool = False
    ) -> "Base":
        """What the config says, and where it leaves something open, what the adapter was trained on.

        Raises UserError for what is not there or not to be read, and unless `force` is given, for another base,
        tokenizer or template than the adapter's, and for files of it that were altered.
        """
        if adapter is not None and not (Path(adapter) / CONFIG).is_file() and not is_mistral(Path(adapter)):
            raise UserError(f"{adapter}: holds no {CONFIG}; name the folder of an adapter, such as RUN/adapter")
        made_on = read_provenance(adapter) if adapter is not None else {}
        quantize: Literal["nf4"] | None = "nf4" if config.quantize == "nf4" else None
        if (trained_on := made_on.get("quantization")) and config.quantize == "auto":
            quantize = "nf4" if trained_on.get("type") == "nf4" else None
            double_quant = trained_on.get("double_quant")
            config = config if double_quant is None else replace(config, double_quant=double_quant)
        if adapter is not None and config.path == UNNAMED:
            if not made_on.get("base_path"):
                raise UserError(f"{adapter}: does not say where its base lies; give it with --model.path")
            config = replace(config, path=made_on["base_path"])
        checkpoint = open_checkpoint("demo" if config.path == UNNAMED else config.path)
        if config.quantize == "none":
            checkpoint.refuse_nf4('model.quantize "none"')
        file = config.tokenizer or made_on.get("tokenizer_path") or checkpoint.folder
        old_hf_spaces = config.old_hf_spaces or (made_on.get("tokenizer") or {}).get("template") == OLD_HF
        tokenizer = load_tokenizer(file, old_hf_spaces=old_hf_spaces)
        if mismatch := tokenizer.mismatch(checkpoint.config.vocab_size):
            raise UserError(mismatch)
        device = pick_device(config.device)
        dtype, _ = pick_dtype(device, config.dtype)
        base = Base(checkpoint, tokenizer, quantize, config.double_quant, dtype, device, adapter, scaling)
        if adapter is None:
            return base
        here = {
            "base_fingerprint": checkpoint.fingerprint(),
            "quantization": recipe(base.nf4_double_quant, dtype),
            "tokenizer": {"sha256": data_fingerprint(tokenizer.path), "template": tokenizer.template},
        }
        said = check_origin(Path(adapter), made_on, here, force)
        added = read_adapter_config(adapter, checkpoint.config, scaling=scaling)
        return replace(base, added=added, warnings=tuple(said))

    @property
    def nf4_double_quant(self) -> bool | None:
        """Of weights that are or will be in NF4, whether their absmax are in 8 bits; None of plain ones."""
        if self.checkpoint.nf4:
            return self.checkpoint.double_quant
        return self.double_quant if self.quantize is not None else None

    def predict(self, rows: int, length: int, new: int | None = None) -> dict[str, int]:
        """Bytes by owner while `rows` texts of `length` tokens are continued by `new`, or scored if that is None."""
        dense = cast(DenseDtype, str(self.dtype).removeprefix("torch."))
        double_quant, sizes = self.nf4_double_quant, self.checkpoint.config
        storage = dense if double_quant is None else "nf4 double-quantized" if double_quant else "nf4"
        plan = StepPlan(sizes, storage, dense, self.added, rows, length, sees="mask", device=self.device)
        at_rest = predict(sizes, storage, dense, self.added)
        learning = ("gradients", "optimizer")
        process = {"process": private_bytes()} if self.device.type == "cpu" else {}
        held = process | {owner: n for owner, n in at_rest.items() if owner not in learning}
        return held | {owner: n for owner, n in plan.forward(new).items() if n}

    def check(self, *works: tuple[int, int, int | None]) -> dict[str, int]:
        """The prediction for the largest of `works`, (rows, length, new). Raises UserError if it does not fit."""
        predicted = max((self.predict(*work) for work in works), key=lambda owners: sum(owners.values()))
        total, free = sum(predicted.values()), free_bytes(self.device)
        if total > free:
            packed = "" if "packed weights" in predicted else ", or --model.quantize nf4"
            need = f"{as_text(total)} of memory are needed, {as_text(free)} are free"
            raise UserError(f"{need}: ask for fewer or shorter texts at a time{packed}")
        return predicted

    def load(self) -> Mistral:
        """The model in eval mode, with the adapter."""
        model = load_model(
            self.checkpoint.folder,
            quantize=self.quantize,
            double_quant=self.double_quant,
            dtype=self.dtype,
            device=self.device,
        )
        if self.adapter is not None:
            read_adapter(self.adapter, model.config, scaling=self.scaling).attach(model)
        return model.eval()
