"""The checkpoint formats that this package adds to core's, by name."""

from __future__ import annotations

from typing import NamedTuple


class Format(NamedTuple):
    """A format of this package.

    Attributes:
        name: what ``core convert`` calls it.
        summary: one sentence.
        extends: format that it is a dialect of.
        readable: whether it is opened by this package, and not by core.
        made: whether checkpoints of any other format can be converted to it.
    """

    name: str
    summary: str
    extends: str = ""
    readable: bool = True
    made: bool = True


FORMATS = (
    Format("universal", "Whole tensors and one manifest: for any layout.", "safetensors"),
    Format("deepspeed", "DeepSpeed: ZeRO stages 0 to 3."),
    Format("megatron", "Megatron: torch_dist, and older mp_rank files.", "dcp"),
    Format("torch-dcp", "A DCP folder with all that torch needs to resume.", "dcp"),
    Format("huggingface", "A folder that from_pretrained loads.", readable=False),
    Format("accelerate", "Folders of accelerate's save_state.", made=False),
    Format("ranks", "A torch.save of every rank, as verl writes it.", made=False),
    Format("torch-save", "One torch.save of a whole state.", made=False),
)
