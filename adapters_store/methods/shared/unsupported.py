"""Say why a PEFT method is not served, and what to do with its adapter.

PEFT can convert to LoRA the methods whose linear layers have `supports_lora_conversion`; a test compares this list with
the installed PEFT.
"""

from __future__ import annotations

from collections.abc import Collection

CONVERTIBLE = frozenset(
    {
        "C3A",
        "DELORA",
        "FOURIERFT",
        "GRALORA",
        "PSOFT",
        "RANDLORA",
        "TINYLORA",
        "UNILORA",
        "VBLORA",
        "WAVEFT",
    }
)
INCONVERTIBLE = frozenset(
    {
        "ADAMSS",
        "ADAPTION_PROMPT",
        "BOFT",
        "DEFT",
        "FROD",
        "GLORA",
        "HIRA",
        "HRA",
        "LILY",
        "OSF",
        "PEANUT",
        "POLY",
        "PVERA",
        "ROAD",
        "SHADOW",
        "SHIRA",
        "SUPERTUNING",
        "XLORA",
    }
)


def refusal(peft_type: str, served: Collection[str]) -> str:
    """Build the message that refuses a peft_type; `served` are those that are served."""
    if peft_type in CONVERTIBLE:
        return (
            f"peft_type {peft_type} is not served, but PEFT can convert it to LoRA, an approximation of the rank that "
            "you choose: peft.save_as_lora(folder, model, rank=...), then upload that folder"
        )
    if peft_type in INCONVERTIBLE:
        return (
            f"peft_type {peft_type} is not served, and PEFT cannot convert it to LoRA: train one of "
            f"{', '.join(sorted(served))} instead"
        )
    return f"peft_type {peft_type[:40]} is not known; served are {', '.join(sorted(served))}"
