"""Parity: what the engine says of a trainer's own prompts beside what the trainer said.

Logits are compared but for a constant, which no softmax sees: `error` is the largest difference over the trainer's best
tokens once the mean difference is taken off. A greedy continuation is compared token by token, each after the trainer's
own tokens before it: `margin` is by how much the engine prefers another token, so that a near tie is one.
"""

from __future__ import annotations

from collections.abc import Sequence

from adapters_store.format.folder import Artifact
from adapters_store.format.manifest import ParityCase
from server.core import Logprobs

# The largest error or margin, in logits (nats), by how the base's weights are kept and by how the adapter's tensors are
# written: the larger of both counts. About ten times what sound adapters of all methods show on the bases that were
# tried; an adapter at another scale or for another base is off by whole units. The example on SmolLM2-135M shows
# 1e-5 at fp32, 0.009 at fp16 and 0.25 at int8 (`python -m tests.benchmarks.parity`). bf16 is of bases on a GPU and of
# trainers that computed in it, which was not measured here: the example rounded to bf16 is off by 0.002.
TOLERANCES = {"fp32": 0.02, "fp16": 0.15, "bf16": 0.75, "int8": 2.0}
PRECISION_OF_DTYPE = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def tolerance(precision: str, artifact: Artifact) -> float:
    """The largest error or margin (logits) that a server of this precision allows an artifact of these tensors."""
    kept = {PRECISION_OF_DTYPE[str(tensor.dtype).removeprefix("torch.")] for tensor in artifact.tensors.values()}
    return max(TOLERANCES[name] for name in {precision, *kept})


def error(case: ParityCase, said: Logprobs) -> float:
    """The largest difference of logits after the prompt. A token not among the engine's best counts as its last one.

    This can only understate the difference, which is still far off for an adapter that is wrong.
    """
    ours, least = dict(said.top), said.top[-1][1]
    off = [logit - ours.get(token, least) for token, logit in case.top]
    mean = sum(off) / len(off)
    return max(abs(one - mean) for one in off)


def margin(said: Sequence[Logprobs]) -> float:
    """The largest lead (logits) of the engine's best token over the trainer's, along a continuation; 0 if none."""
    return max((one.top[0][1] - one.chosen for one in said), default=0.0)
