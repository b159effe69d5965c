"""Validation in the engine, before anything is kept."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters_store.errors import ArtifactError, WrongBaseError
from adapters_store.format.folder import CONFIG, MANIFEST, WEIGHTS, read_folder, write_folder
from adapters_store.format.manifest import BaseRef, Manifest, ParityCase
from adapters_store.methods.compile import compile_patch
from adapters_store.methods.shared.unused_tensors import unused_tensors, with_grad_tracking
from adapters_store.primitives import Patch
from server.core import EngineFailure, ForwardReport, FusedCount, Logprobs
from server.engine.client import require_ready
from server.uploads import parity, validation
from server.uploads.preload import TreeImport
from tests.kit import families
from tests.kit.adapters import make_peft, zip_folder
from tests.kit.families import FAMILIES, FAMILIES_OF_BIASED
from tests.kit.forge import spec_of, toy_artifact
from tests.server.world import Site, error_of, ready_of

FP16, FP32 = torch.finfo(torch.float16).max, torch.finfo(torch.float32).max

pytestmark = pytest.mark.anyio


def with_parity(site: Site, folder: Path, into: Path, cases: list[dict[str, Any]]) -> bytes:
    """A zip of a copy whose manifest carries parity."""
    shutil.copytree(folder, into)
    base = {"name": "tiny", "identity": require_ready(site.state.client).spec.identity, "weights": "b" * 64}
    said = {"format_version": 1, "method": "lora", "base": base, "parity": cases}
    (into / MANIFEST).write_text(json.dumps(said))
    return zip_folder(into)


def echoed(first: int, error: float = 0.0) -> dict[str, Any]:
    """A case as the fake engine answers it, the best logit wrong by an error, all of them moved by a constant."""
    top = [(first + at, 7.0 - 0.25 * (at + 1)) for at in range(20)]
    top[0] = (first, top[0][1] + error)
    return {"prompt_token_ids": [first, 2, 3], "top": top, "continuation": [first, 8, 9]}


async def test_an_upload_is_probed_before_it_is_kept(
    site: Site, zips: list[bytes], loras: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 prompts of mixed length run, in a namespace of their own, over the staged bytes; then nothing is staged."""
    staged: list[str] = []
    stage = site.engine.stage

    def noted(digest: str, folder: str | None) -> None:
        staged.append(str(folder))
        stage(digest, folder)

    monkeypatch.setattr(site.engine, "stage", noted)
    checks = (await site.upload("a", zips[0])).json()["checks"]
    probes, digest = site.engine.probed, read_folder(loras[0]).digest
    assert len(probes) == 8 and len({probe.namespace for probe in probes}) == 1
    assert sorted(len(probe.prompt) for probe in probes) == list(validation.PROBE_LENGTHS)
    assert all(probe.is_probe and probe.adapters[0].digest == digest for probe in probes)
    assert (checks[-1]["name"], checks[-1]["figure"]) == ("probe", 8)
    assert str(site.data / "artifacts" / "staging") in staged[0] and staged[1:] == ["None"]
    assert site.engine.staged == {} and not site.engine.submitted
    await site.upload("b", zips[0])
    assert probes[8].namespace != probes[0].namespace


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("nonfinite_logits", 422, "probe_failed"),
        ("adapter_too_large", 413, "artifact_too_large"),
        ("deadline_exceeded", 503, "overloaded"),
        ("overloaded", 503, "overloaded"),
        ("adapter_failed", 503, "adapter_failed"),
        ("internal", 500, "internal"),
    ],
)
async def test_a_failed_probe_keeps_nothing(
    site: Site, zips: list[bytes], loras: list[Path], code: str, status: int, said: str
) -> None:
    """A probe that the engine fails is its status, nothing is stored, and the versions that are served stay."""
    await site.upload("a", zips[0])
    site.engine.probe_failure = EngineFailure(code, "the engine's own words")
    answer = await site.upload("a", zips[1])
    assert (answer.status_code, error_of(answer)["code"]) == (status, said)
    assert ("retry-after" in answer.headers) == (status == 503)
    assert len(site.stored()) == 1 and read_folder(loras[1]).digest in site.engine.discarded
    assert [version["version"] for version in (await site.http.get("/tasks/a")).json()["versions"]] == [1]
    site.engine.probe_failure = None
    assert (await site.ask("a", prompt="x"))["adapter"]["version"] == 1
    assert (await site.upload("a", zips[1])).status_code == 201


async def test_what_is_kept_stays_where_a_second_probe_fails(site: Site, zips: list[bytes]) -> None:
    """A version whose bytes are uploaded again and then fail their probe stays, and is not forgotten."""
    await site.upload("a", zips[0])
    site.engine.probe_failure = EngineFailure("nonfinite_logits", "no numbers")
    assert (await site.upload("b", zips[0])).status_code == 422
    assert len(site.stored()) == 1 and not site.engine.discarded
    assert (await site.ask("a", prompt="x"))["adapter"]["version"] == 1


async def test_a_busy_engine_is_503(site: Site, zips: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe that gets no turn in time is 503 with what probes take in Retry-After, and nothing is stored."""
    monkeypatch.setattr(validation, "PROBE_WITHIN_S", 0.05)
    monkeypatch.setattr(site.state.uploads.validator, "_pace_s", 6.3)
    site.engine.are_probes_stuck = True
    answer = await site.upload("a", zips[0])
    assert (answer.status_code, answer.headers["retry-after"], error_of(answer)["code"]) == (503, "7", "overloaded")
    assert "nothing was stored" in error_of(answer)["message"] and site.stored() == set()
    assert len(site.engine.probed) == 8 == len(site.engine.aborted) and site.engine.staged == {}


async def test_an_upload_waits_as_long_as_it_says(site: Site, zips: list[bytes]) -> None:
    """A busy engine is 503 after the upload's own `timeout_s`, which is above nothing and at most an hour."""
    site.engine.are_probes_stuck = True
    answer = await site.upload("a", zips[0], timeout_s=0.05)
    assert answer.status_code == 503 and "within 0.05 s" in error_of(answer)["message"]
    for wrong in ("0", "-1", "3601", "nan", "inf", "soon"):
        answer = await site.upload("a", zips[0], timeout_s=wrong)
        assert answer.status_code == 422 and error_of(answer)["param"] == "timeout_s", wrong


async def test_an_engine_that_dies_meanwhile(site: Site, zips: list[bytes]) -> None:
    """An engine that dies of a probe is 503; nothing is stored."""
    site.engine.are_probes_stuck = True
    upload = asyncio.create_task(site.upload("a", zips[0]))
    while not site.engine.probed:
        await asyncio.sleep(0)
    site.engine.die()
    assert (await upload).status_code == 503
    site.engine.revive()
    assert site.stored() == set()


async def test_parity(site: Site, loras: list[Path], tmp_path: Path) -> None:
    """The trainer's prompts come first, its tokens are forced, and the figure of the worst one is told."""
    body = with_parity(site, loras[0], tmp_path / "with", [echoed(5), echoed(7)])
    answer = await site.upload("a", body)
    assert answer.status_code == 201, answer.text
    assert [probe.prompt for probe in site.engine.probed[:2]] == [[5, 2, 3], [7, 2, 3]]
    assert site.engine.probed[0].sampling.forced == (5, 8, 9) and len(site.engine.probed) == 8
    check = answer.json()["checks"][-1]
    assert (check["name"], check["figure"], check["limit"]) == ("parity", 0.0, 0.02)
    assert check["detail"].startswith("2 of 2 prompts: logits within 0 of the trainer's, its 6 tokens within 0")


@pytest.mark.parametrize("error", [-0.1, 0.1])
async def test_parity_that_is_off(site: Site, loras: list[Path], tmp_path: Path, error: float) -> None:
    """Logits that are off by more than is allowed are 422 with the figure, and nothing is stored."""
    answer = await site.upload("a", with_parity(site, loras[0], tmp_path / "off", [echoed(5), echoed(7, error)]))
    assert (answer.status_code, error_of(answer)["code"]) == (422, "parity_failed")
    assert "within 0.095 of the trainer's" in error_of(answer)["message"] and site.stored() == set()


async def test_parity_of_a_foreign_vocabulary(site: Site, loras: list[Path], tmp_path: Path) -> None:
    """A token that the base has not is named."""
    answer = await site.upload("a", with_parity(site, loras[0], tmp_path / "off", [echoed(240)]))
    assert answer.status_code == 422 and "token 259" in error_of(answer)["message"]


async def test_parity_that_has_no_room(site: Site, loras: list[Path], tmp_path: Path) -> None:
    """A prompt that this server has no room for is left out, and the figure says of how many."""
    long = {**echoed(5), "prompt_token_ids": [1] * 398}
    checks = (await site.upload("a", with_parity(site, loras[0], tmp_path / "long", [long, echoed(5)]))).json()[
        "checks"
    ]
    assert checks[-1]["detail"].startswith("1 of 2 prompts")


def said(*pairs: tuple[int, float], chosen: float = 0.0) -> Logprobs:
    """The log-probabilities that the engine gives."""
    return Logprobs(chosen, list(pairs))


@pytest.mark.parametrize(
    ("ours", "error"),
    [
        (said((1, -1.0), (2, -2.0), (3, -9.0)), 0.0),
        (said((2, -2.0), (1, -2.0), (3, -9.0)), 0.5),
        (said((1, -1.0), (9, -5.0)), 1.5),  # 2 is no better than the last that is told
    ],
)
def test_the_error_of_logits(ours: Logprobs, error: float) -> None:
    """Differences but for a constant; what the engine does not tell is at most as good as the last that it does."""
    assert parity.error(ParityCase([0], [(1, 5.0), (2, 4.0)], []), ours) == pytest.approx(error)


def test_the_margin_of_a_continuation() -> None:
    """The margin is the engine's largest preference of another token; a tie is none."""
    assert parity.margin([said((1, -0.5), chosen=-0.5), said((1, -0.5), chosen=-0.75)]) == pytest.approx(0.25)
    assert parity.margin([]) == 0.0


@pytest.mark.parametrize(
    ("precision", "dtype", "allowed"),
    [("fp32", torch.float32, "fp32"), ("fp32", torch.bfloat16, "bf16"), ("int8", torch.float16, "int8")],
)
def test_the_coarser_of_base_and_adapter_decides(precision: str, dtype: torch.dtype, allowed: str) -> None:
    """The tolerance is that of the base's precision or of the adapter's own dtype, whichever is larger."""
    artifact = toy_artifact(tensors={"a": torch.ones(1, dtype=dtype)})
    assert parity.tolerance(precision, artifact) == parity.TOLERANCES[allowed]


@pytest.mark.parametrize("family", [*FAMILIES, *FAMILIES_OF_BIASED])
def test_every_tensor_acts(biased_base: Path, artifact: Callable[[str, int], Path], family: str) -> None:
    """Each tensor that an artifact of any family carries acts in a primitive; an empty patch leaves all unused."""
    followed = with_grad_tracking(read_folder(artifact(family, 0)))
    with torch.enable_grad():
        patch = compile_patch(followed, spec_of(biased_base))
    assert unused_tensors(followed, patch) == []
    assert unused_tensors(followed, Patch("", "", ())) == [name for name, t in followed.tensors.items() if t.numel()]


def test_keys_that_are_not_used_are_told(tiny_base: Path, loras: list[Path], tmp_path: Path) -> None:
    """Keys that nobody knows and that say nothing are named by a check of their own, which is else not there."""
    folder = tmp_path / "hat"
    shutil.copytree(loras[0], folder)
    _, _, checks = validation.check_folder(ready_of(tiny_base), folder)
    assert "config" not in {check["name"] for check in checks}
    config = json.loads((folder / CONFIG).read_text()) | {"use_newer": False, "lorap_emb_lr": 1e-6}
    (folder / CONFIG).write_text(json.dumps(config))
    _, _, checks = validation.check_folder(ready_of(tiny_base), folder)
    (told,) = [check for check in checks if check["name"] == "config"]
    assert told["detail"] == "keys that are not known and not used: lorap_emb_lr, use_newer"


def test_what_repeats_the_base_is_counted_apart(tiny_base: Path, tmp_path: Path) -> None:
    """A norm that was saved as the base has it is let in, and said to repeat the base instead of to act."""
    lora = families.loras.config(target_modules=["q_proj"], modules_to_save=["model.norm"])
    folder = make_peft(
        tmp_path / "hat",
        tiny_base,
        lora,
        fill=lambda name, value, seed: families.loras.fill(name, value, seed) if "lora_" in name else value,
    )
    _, _, checks = validation.check_folder(ready_of(tiny_base), folder)
    (applied,) = [check for check in checks if check["name"] == "applied"]
    assert applied["detail"] == "4 of 5 tensors act in 2 primitives, the others repeat the base or one another"


@pytest.mark.parametrize(
    ("theirs", "is_taken"), [("longrope over 48 tokens", True), ("longrope up to 48 tokens", False)]
)
def test_other_rotary_factors_are_refused(
    tiny_base: Path, loras: list[Path], tmp_path: Path, theirs: str, is_taken: bool
) -> None:
    """An adapter whose trainer chose other factors of long sequences is refused by their names, before it is probed."""
    ready = ready_of(tiny_base)
    report = ForwardReport(
        backend="cpu", precision="fp32", num_threads=1, num_layers=2, attentions=FusedCount(),
        gated_blocks=FusedCount(), norms=FusedCount(), is_whole_decoder=True, is_direct=True,
        rotary="longrope over 48 tokens",
    )  # fmt: skip
    ready = msgspec.structs.replace(ready, forward=report)
    base = BaseRef("tiny", ready.spec.identity, "b" * 64)
    manifest, config = Manifest(1, "lora", base, rotary=theirs), read_folder(loras[0]).config
    write_folder(tmp_path / "hat", config, (loras[0] / WEIGHTS).read_bytes(), manifest)
    if is_taken:
        validation.check_folder(ready, tmp_path / "hat")
    else:
        with pytest.raises(
            WrongBaseError, match=r"trained with .* longrope up to 48 tokens, .* has longrope over 48 tokens"
        ):
            validation.check_folder(ready, tmp_path / "hat")


@pytest.mark.parametrize(
    ("factor", "largest", "is_idle"), [(0.0, FP32, True), (1e-12, FP32, False), (1e-12, FP16, True)]
)
def test_what_changes_nothing_is_told(
    tiny_base: Path, tmp_path: Path, factor: float, largest: float, is_idle: bool
) -> None:
    """A LoRA whose B is zero, or is where it is stored, is refused by a site; one such site of two is told."""
    ready = msgspec.structs.replace(ready_of(tiny_base), largest_value=largest)
    lora = families.loras.config(target_modules=["q_proj"])

    def made(pattern: str) -> Path:
        def fill(name: str, value: torch.Tensor, seed: torch.Generator) -> torch.Tensor:
            return families.loras.fill(name, value, seed) * (factor if re.search(pattern, name) else 1.0)

        return make_peft(tmp_path / pattern, tiny_base, lora, fill=fill)

    (applied,) = (c for c in validation.check_folder(ready, made(r"layers.0.*lora_B"))[2] if c["name"] == "applied")
    site = "model.layers.0.self_attn.q_proj"
    told = f"4 of 4 tensors act in 2 primitives; 1 of the primitives change nothing, the first at {site}"
    assert applied["detail"] == (told if is_idle else told.partition(";")[0])
    if is_idle:
        with pytest.raises(ArtifactError, match=f"the adapter changes nothing: at {site}") as caught:
            validation.check_folder(ready, made("lora_B"))
        assert caught.value.param == site


@pytest.mark.parametrize(("value", "largest", "is_taken"), [(7e4, 65504.0, False), (6e4, 65504.0, True)])
def test_what_16_bits_cannot_hold(
    tiny_base: Path, loras: list[Path], tmp_path: Path, value: float, largest: float, is_taken: bool
) -> None:
    """A value that 16-bit slots cannot hold is refused by its tensor's name at upload, not when it is loaded."""
    shutil.copytree(loras[0], tmp_path / "big")
    found = load_file(tmp_path / "big" / WEIGHTS)
    name = next(name for name in sorted(found) if "lora_A" in name)
    found[name][0, 0] = value
    save_file(found, tmp_path / "big" / WEIGHTS)
    ready = ready_of(tiny_base)
    ready = type(ready)(**{n: getattr(ready, n) for n in ready.__struct_fields__} | {"largest_value": largest})
    if is_taken:
        validation.check_folder(ready, tmp_path / "big")
    else:
        with pytest.raises(ArtifactError, match=r"70000 at model\.layers\.0\..*q_proj is over 65504"):
            validation.check_folder(ready, tmp_path / "big")


async def test_an_import_goes_through_the_same_door(
    site: Site, loras: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder that is imported is probed as an upload is: one off its parity is one line, the others come in."""
    with_parity(site, loras[0], tmp_path / "tree" / "off", [echoed(5, 1.0)])
    shutil.copytree(loras[1], tmp_path / "tree" / "good")
    await TreeImport(site.state.uploads, site.state.metrics).begin(tmp_path / "tree")
    (line,) = [record for record in caplog.records if record.message == "an adapter was not taken in"]
    assert "parity: 1 of 1 prompts" in vars(line)["reason"]
    assert site.stored() == {read_folder(loras[1]).digest} and len(site.engine.probed) == 16
    assert [task["task"] for task in (await site.http.get("/tasks")).json()["tasks"]] == ["base", "good"]
