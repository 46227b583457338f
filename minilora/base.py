"""A base to be used: what the command line names, with an adapter or without, found and checked before it is loaded."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import torch

from minilora.backend import pick_device, pick_dtype
from minilora.checkpoint.adapter import CONFIG, load_adapter, read_adapter_config, read_provenance
from minilora.checkpoint.load import load_model
from minilora.checkpoint.open import Checkpoint, open_checkpoint
from minilora.config import BaseConfig
from minilora.data.records import data_fingerprint
from minilora.errors import UserError
from minilora.memory import DenseDtype, StepPlan, as_text, free_bytes, predict, private_bytes
from minilora.model import Mistral
from minilora.tokenizer import Tokenizer, load_tokenizer

UNNAMED = ""  # a path: the adapter names its base, and without an adapter it is "demo"


@dataclass(frozen=True)
class Base:
    """A checkpoint and its tokenizer, and how its weights are to be loaded."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    quantize: Literal["nf4"] | None
    double_quant: bool
    dtype: torch.dtype
    device: torch.device
    adapter: str | None

    @staticmethod
    def find(config: BaseConfig, adapter: str | None = None) -> "Base":
        """What the config says, and where it leaves something open, what the adapter was trained on.

        Raises UserError for what is not there, and for another tokenizer than the adapter's.
        """
        if adapter is not None and not (Path(adapter) / CONFIG).is_file():
            raise UserError(f"{adapter}: holds no {CONFIG}; name the folder of an adapter, such as RUN/adapter")
        made_on = read_provenance(adapter) if adapter is not None else {}
        quantize: Literal["nf4"] | None = "nf4" if config.quantize == "nf4" else None
        if adapter is not None and config.quantize == "auto":
            quantize = "nf4" if made_on.get("quantize") else None
            config = replace(config, double_quant=made_on.get("double_quant", config.double_quant))
        if adapter is not None and config.path == UNNAMED:
            if "base_path" not in made_on:
                raise UserError(f"{adapter}: does not say where its base lies; give it with --model.path")
            config = replace(config, path=made_on["base_path"])
        checkpoint = open_checkpoint("demo" if config.path == UNNAMED else config.path)
        if config.quantize == "none":
            checkpoint.refuse_nf4('model.quantize "none"')
        tokenizer = load_tokenizer(config.tokenizer or made_on.get("tokenizer_path") or checkpoint.folder)
        trained_with = (made_on.get("tokenizer") or {}).get("sha256")
        if trained_with not in (None, data_fingerprint(tokenizer.path)):
            another = f"is not the tokenizer that {adapter} was trained with"
            raise UserError(f"{tokenizer.path}: {another}; name that one with --model.tokenizer")
        device = pick_device(config.device)
        dtype, _ = pick_dtype(device, config.dtype)
        return Base(checkpoint, tokenizer, quantize, config.double_quant, dtype, device, adapter)

    def predict(self, rows: int, length: int, new: int | None = None) -> dict[str, int]:
        """Bytes by owner while `rows` texts of `length` tokens are continued by `new`, or scored if that is None."""
        dense = cast(DenseDtype, str(self.dtype).removeprefix("torch."))
        quantized = self.checkpoint.nf4 or self.quantize is not None
        double_quant = self.checkpoint.double_quant if self.checkpoint.nf4 else self.double_quant
        storage = dense if not quantized else "nf4 double-quantized" if double_quant else "nf4"
        added = None if self.adapter is None else read_adapter_config(Path(self.adapter), self.checkpoint.config)
        plan = StepPlan(self.checkpoint.config, storage, dense, added, rows, length, sees="mask", device=self.device)
        at_rest = predict(self.checkpoint.config, storage, dense, added)
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
        return (load_adapter(model, self.adapter) if self.adapter is not None else model).eval()
