"""AdapterHub's saved bottlenecks against AdapterHub's own answers, and every key of its config."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from adapters_store.base.spec import BaseSpec
from adapters_store.errors import ArtifactError
from adapters_store.format.archive import unpack_upload, zipped
from adapters_store.format.folder import (
    ALIASES,
    CONFIG,
    REFUSED,
    WEIGHTS,
    Artifact,
    find_parts,
    read_files,
    read_folder,
)
from adapters_store.methods import method_of
from adapters_store.methods.adapterhub import IGNORED_KEYS, IGNORED_OUTER_KEYS, SERVED_VALUES, BnConfig, SavedConfig
from adapters_store.methods.compile import compile_patch
from adapters_store.primitives import Bottleneck
from tests.adapters_store.methods.spoil import assert_refused_by_name
from tests.golden.make_adapterhub import ANSWERS, CASES, HERE, base_digest
from tests.kit import reference
from tests.kit.forge import spec_of, toy_artifact, zip_of
from tests.kit.like_peft import changed
from tests.kit.patches import all_of
from tests.kit.tiny import make_tiny_base

GOLDEN = json.loads(ANSWERS.read_text())
Base = tuple[Any, Path]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    """The tiny bases that the golden artifacts were made for."""
    made: dict[str, Base] = {}

    def base_of(model_type: str) -> Base:
        if model_type not in made:
            folder = make_tiny_base(tmp_path_factory.mktemp(model_type), model_type)
            made[model_type] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), folder
        return made[model_type]

    return base_of


@pytest.mark.parametrize("model_type", CASES)
def test_the_bases_are_those_of_the_golden_answers(bases: Callable[[str], Base], model_type: str) -> None:
    """Made by either version of transformers, a tiny base has the same weights."""
    assert base_digest(bases(model_type)[0]) == GOLDEN[model_type]["base_sha256"]


@pytest.mark.parametrize(
    ("model_type", "name"), [(kind, name) for kind, cases in CASES.items() for name in ["base", *cases]]
)
def test_an_artifact_answers_as_in_adapterhub(bases: Callable[[str], Base], model_type: str, name: str) -> None:
    """Logits after the prompt are AdapterHub's, and so are all greedy tokens; they are not the base's."""
    model, folder = bases(model_type)
    worn = [] if name == "base" else [(compile_patch(read_folder(HERE / model_type / name), spec_of(folder)), 1.0)]
    answers = GOLDEN[model_type]["answers"]
    for told, stock in zip(answers[name], answers["base"], strict=True):
        prompt, tokens = told["prompt"], told["tokens"]
        logits = reference.logits(model, worn, prompt + tokens)[len(prompt) - 1 : -1]
        assert (logits[0] - torch.tensor(told["logits"])).abs().max() < 1e-3
        assert logits.argmax(-1).tolist() == tokens
        assert name == "base" or max(abs(a - b) for a, b in zip(told["logits"], stock["logits"], strict=True)) > 0.1


@pytest.fixture(scope="module")
def spec(bases: Callable[[str], Base]) -> BaseSpec:
    """The spec of the tiny llama."""
    return spec_of(bases("llama")[1])


def golden(name: str = "houlsby") -> Artifact:
    """A golden artifact of the tiny llama."""
    return read_folder(HERE / "llama" / name)


def inside(artifact: Artifact, **changes: Any) -> Artifact:
    """The same with other values in AdapterHub's own config; None takes a key away."""
    config = {key: value for key, value in {**artifact.config["config"], **changes}.items() if value is not None}
    return changed(artifact, {"config": config}, {})


def acting(artifact: Artifact, spec: BaseSpec) -> dict[str, str]:
    """Site -> what each bottleneck there reads."""
    return {p.site: p.of for p in compile_patch(artifact, spec).primitives if isinstance(p, Bottleneck)}


def test_a_config_without_peft_type_is_known_by_its_form(spec: BaseSpec) -> None:
    """AdapterHub's config is recognised; a peft_type, or no config in the config, and it is not AdapterHub's."""
    assert method_of(golden()).name == compile_patch(golden(), spec).method == "bottleneck"
    own: dict[str, Any] = golden().config
    wrong: list[dict[str, Any]] = [{**own, "peft_type": "NOPE"}, {**own, "config": None}, {"config": {}}]
    for config in wrong:
        with pytest.raises(ArtifactError, match="peft_type"):
            method_of(toy_artifact(config))


def test_each_config_acts_where_adapterhub_has_it(spec: BaseSpec) -> None:
    """Houlsby after both blocks, Pfeiffer at the layer's end, parallel on the residual stream, leave_out left out."""
    layers = [f"model.layers.{number}" for number in range(2)]
    after = {f"{layer}.{block}": "output" for layer in layers for block in ("self_attn", "mlp")}
    assert acting(golden("houlsby"), spec) == after
    assert acting(golden("houlsby-attention"), spec) == {site: of for site, of in after.items() if "self_attn" in site}
    assert acting(golden("pfeiffer"), spec) == {layers[1]: "output"}
    assert acting(golden("plus"), spec) == dict.fromkeys(layers, "output")
    assert acting(golden("parallel"), spec) == {f"{layer}.mlp": "stream" for layer in layers}


def test_who_saved_from_a_model_without_a_head_is_understood(spec: BaseSpec) -> None:
    """LlamaModel names its tensors without the first word."""
    short = {name.removeprefix("model."): tensor for name, tensor in golden().tensors.items()}
    headless = dataclasses.replace(golden(), tensors=short)
    whole, same = (all_of(Bottleneck, compile_patch(artifact, spec)) for artifact in (golden(), headless))
    assert [p.site for p in whole] == [p.site for p in same]
    mixed = {**golden().tensors, "layers.0.mlp_adapters.adapters.hat.adapter_up.bias": torch.ones(64)}
    with pytest.raises(ArtifactError, match=r"layers\.0\.mlp_adapters.* is extra"):
        compile_patch(dataclasses.replace(golden(), tensors=mixed), spec)


@pytest.mark.parametrize("kept", ["adapter_norm_before", "adapter_down.0"])
def test_a_norm_has_one_value_under_two_names(spec: BaseSpec, kept: str) -> None:
    """Either name of a norm or both are accepted with ln_before; if they differ, neither is."""
    artifact = golden("houlsby-norms")
    other = {"adapter_norm_before": ".adapter_down.0.", "adapter_down.0": ".adapter_norm_before."}[kept]
    norms = [name for name in artifact.tensors if other in name]
    assert len(norms) == 8
    one = compile_patch(changed(artifact, {}, dict.fromkeys(norms)), spec).primitives
    for ours, theirs in zip(one, compile_patch(artifact, spec).primitives, strict=True):
        assert isinstance(ours, Bottleneck) and isinstance(theirs, Bottleneck) and ours.norm_before is not None
        assert theirs.norm_before is not None and torch.equal(ours.norm_before[0], theirs.norm_before[0])
    with pytest.raises(ArtifactError, match="is not equal to its other name's"):
        compile_patch(changed(artifact, {}, {norms[0]: torch.zeros(64)}), spec)


def test_every_key_that_adapterhub_writes_is_judged() -> None:
    """Every key of the saved config is known, and every known key is in it."""
    known = {*SERVED_VALUES, *IGNORED_KEYS, *BnConfig.__struct_fields__}
    assert golden().config["config"].keys() == known - {"architecture"}  # it is there for other methods
    assert golden().config.keys() == {*IGNORED_OUTER_KEYS, *SavedConfig.__struct_fields__}


REFUSED_INSIDE: dict[str, tuple[str, dict[str, Any], str]] = {
    "another method": ("houlsby", {"architecture": "lora"}, "architecture"),
    "a union": ("houlsby", {"architecture": "union"}, "architecture"),
    "Compacter": ("houlsby", {"phm_layer": True}, "phm_layer"),
    "invertible": ("houlsby", {"inv_adapter": "nice"}, "inv_adapter"),
    "gates": ("houlsby", {"use_gating": True}, "use_gating"),
    "cross attention": ("houlsby", {"cross_adapter": True}, "cross_adapter"),
    "an unknown key": ("houlsby", {"hat_layer": 1}, "hat_layer"),
    "the stream is lost": ("houlsby", {"original_ln_after": False}, "original_ln_after"),
    "a parallel one loses the stream": ("parallel", {"original_ln_after": False}, "original_ln_after"),
    "the stream is added twice": ("pfeiffer", {"residual_before_ln": False}, "original_ln_after"),
    "the stream is not added": ("pfeiffer", {"original_ln_after": False}, "original_ln_after"),
    "post_add": ("pfeiffer", {"residual_before_ln": "post_add"}, "residual_before_ln"),
    "the norm is on the residual": (
        "pfeiffer-norm",
        {"adapter_residual_before_ln": True},
        "adapter_residual_before_ln",
    ),
    "attention on the stream": ("houlsby", {"original_ln_before": True}, "mh_adapter"),
    "parallel to attention": ("houlsby", {"is_parallel": True}, "mh_adapter"),
    "leaky": ("houlsby", {"non_linearity": "leakyrelu"}, "non_linearity"),
}


@pytest.mark.parametrize(("name", "changes", "key"), REFUSED_INSIDE.values(), ids=REFUSED_INSIDE)
def test_an_option_that_changes_the_answer_is_refused_by_name(
    spec: BaseSpec, name: str, changes: dict[str, Any], key: str
) -> None:
    """An option that is not served is never ignored: the key is named."""
    with pytest.raises(ArtifactError, match=key) as caught:
        compile_patch(inside(golden(name), **changes), spec)
    assert (caught.value.code, caught.value.param) == ("method_unsupported", key)


VALUES: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "no factor": ({"reduction_factor": None}, "missing required field `reduction_factor`", CONFIG),
    "factor 0": ({"reduction_factor": 0}, "reduction_factor is 0", "reduction_factor"),
    "a negative factor": ({"reduction_factor": -16}, "reduction_factor is -16", "reduction_factor"),
    "a tiny factor": ({"reduction_factor": 5e-324}, "reduction_factor is", "reduction_factor"),
    "another factor": ({"reduction_factor": 8}, r"need \[8, 64\]", None),
    "a huge factor": ({"reduction_factor": 1e300}, r"need \[1, 64\]", None),
    "no factor for a layer": ({"reduction_factor": {"0": 16}}, "neither the layer 1 nor a default", "reduction_factor"),
    "a factor as a text": ({"reduction_factor": "16"}, r"\$\.reduction_factor", CONFIG),
    "scaling 0": ({"scaling": 0.0}, "scaling is 0", "scaling"),
    "another scaling": ({"scaling": "channel"}, "scaling is missing", None),
    "fewer blocks": ({"mh_adapter": False}, "attention_adapters.* is extra", None),
    "a norm": ({"ln_after": True}, "adapter_norm_after.weight is missing", None),
    "fewer layers": ({"leave_out": [1]}, r"layers\.1.* is extra", None),
    "no layers": ({"leave_out": [0, 1]}, "no tensors, or its config leaves no layer", None),
    "a layer that is not there": ({"leave_out": [2]}, "leave_out names a layer", "leave_out"),
    "another place": ({"mh_adapter": False, "output_adapter": False}, "no tensors, or its config leaves no", None),
}


@pytest.mark.parametrize(("changes", "reason", "param"), VALUES.values(), ids=VALUES)
def test_a_config_that_is_wrong_or_disagrees_is_refused(
    spec: BaseSpec, changes: dict[str, Any], reason: str, param: str | None
) -> None:
    """Types, sizes and what the tensors say of them are checked, and the sentence names the place."""
    with pytest.raises(ArtifactError, match=reason) as caught:
        compile_patch(inside(golden(), **changes), spec)
    assert param is None or caught.value.param == param


OUTSIDE: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "another model type": ({"model_type": "mistral"}, "wrong_base", "model_type", "is mistral; .* is a LlamaFor"),
    "a model type by plug-in": ({"model_type": "qwen2"}, "method_unsupported", "model_type", "qwen2 is not served"),
    "another width": ({"hidden_size": 576}, "wrong_base", "hidden_size", "hidden_size is 576, .* 64"),
    "adapter-transformers": ({"version": "3.2.1"}, "method_unsupported", "version", "version 3.2.1 is not of"),
    "no version": ({"version": None}, "artifact_invalid", CONFIG, "missing required field `version`"),
    "an unknown key": ({"hat": 1}, "method_unsupported", "hat", "a key that is not known: hat"),
    "another name": ({"name": "cap"}, "artifact_invalid", "", r"adapters\.cap\..* is missing"),
}


@pytest.mark.parametrize(("changes", "code", "param", "reason"), OUTSIDE.values(), ids=OUTSIDE)
def test_what_is_for_another_base_or_library_is_refused(
    spec: BaseSpec, changes: dict[str, Any], code: str, param: str, reason: str
) -> None:
    """The file says which model, which library and which adapter its tensors are of."""
    with pytest.raises(ArtifactError, match=reason) as caught:
        compile_patch(changed(golden(), changes, {}), spec)
    assert caught.value.code == code and param in str(caught.value.param)


UP, DOWN = (f"model.layers.1.output_adapters.adapters.hat.adapter_{end}.weight" for end in ("up", "down.0"))
TENSORS: dict[str, tuple[str, Tensor | None, str]] = {
    "missing": (UP, None, "is missing"),
    "transposed": (UP, torch.ones(4, 64), r"shape \[4, 64\].*need \[64, 4\]"),
    "wrong rank": (DOWN, torch.ones(256), r"shape \[256\]"),
    "another base's width": (DOWN, torch.ones(4, 576), r"shape \[4, 576\]"),
    "another base's layer": (UP.replace("1", "2"), torch.ones(64, 4), "is extra"),
    "another adapter": (UP.replace("hat", "cap"), torch.ones(64, 4), "is extra"),
    "the invertible part": ("model.invertible_adapters.hat.F.0.weight", torch.ones(16, 32), "is extra"),
}


@pytest.mark.parametrize(("name", "tensor", "reason"), TENSORS.values(), ids=TENSORS)
def test_tensors_that_are_not_the_bases_are_refused(
    spec: BaseSpec, name: str, tensor: Tensor | None, reason: str
) -> None:
    """Missing, extra, transposed, of wrong rank, of another base or adapter: refused by the tensor's name."""
    with pytest.raises(ArtifactError, match=reason) as caught:
        compile_patch(changed(golden(), {}, {name: tensor}), spec)
    assert caught.value.param == name and name in str(caught.value)


def test_a_layer_that_does_not_show_its_stream_has_no_parallel_bottleneck(spec: BaseSpec) -> None:
    """Where no norm reads the residual stream for the block, the formula has no h."""
    hidden = dataclasses.replace(spec, layers=[dataclasses.replace(layer, stream=None) for layer in spec.layers])
    with pytest.raises(ArtifactError, match="is_parallel needs") as caught:
        compile_patch(golden("parallel"), hidden)
    assert caught.value.code == "method_unsupported"


# AdapterHub's file names

(ALIAS,) = ALIASES
MEMBERS = {path.name: path.read_bytes() for path in (HERE / "llama" / "houlsby").iterdir()}


def unpacked(room: Path, members: dict[str, bytes]) -> Path:
    """The folder that an upload of these members becomes."""
    (room / "body").write_bytes(zip_of(members))
    (room / "folder").mkdir()
    unpack_upload(room / "body", room / "folder", 2**20)
    return room / "folder"


def test_an_upload_of_adapterhubs_folder_becomes_one_of_pefts_names(tmp_path: Path) -> None:
    """The weights are stored under PEFT's name; the digest is of the content, whichever name they came with."""
    assert set(MEMBERS) == {CONFIG, ALIAS}
    folder = unpacked(tmp_path, {f"hat/{name}": data for name, data in {**MEMBERS, "head_config.json": b"{}"}.items()})
    assert {path.name for path in folder.iterdir()} == {CONFIG, WEIGHTS}
    assert read_folder(folder).digest == golden().digest
    (tmp_path / "packed.zip").write_bytes(zipped(read_files(HERE / "llama" / "houlsby")))
    (tmp_path / "again").mkdir()
    unpack_upload(tmp_path / "packed.zip", tmp_path / "again", 2**20)
    assert read_folder(tmp_path / "again").digest == golden().digest


def test_weights_of_both_names_are_refused(tmp_path: Path) -> None:
    """A choice between two weight files is never made silently: in a zip and in a folder."""
    with pytest.raises(ArtifactError, match=f"{WEIGHTS} twice"):
        unpacked(tmp_path, {**MEMBERS, WEIGHTS: b"x"})
    for name, data in {**MEMBERS, WEIGHTS: b"x"}.items():
        (tmp_path / "folder" / name).write_bytes(data)
    with pytest.raises(ArtifactError, match=f"{ALIAS} and {WEIGHTS} are both there"):
        read_folder(tmp_path / "folder")


@pytest.mark.parametrize("name", REFUSED)
def test_what_else_adapterhub_saves_that_changes_the_answer_is_refused(tmp_path: Path, name: str) -> None:
    """A head, a fusion, an interface: refused by the file's name, in a zip and in a folder, with what to do."""
    for take in (lambda: unpacked(tmp_path, {**MEMBERS, name: b"x"}), lambda: read_folder(tmp_path / "folder")):
        with pytest.raises(ArtifactError, match=f"{name} is not served") as caught:
            take()
        assert (caught.value.code, caught.value.param) == ("method_unsupported", name)
        (tmp_path / "folder" / name).write_bytes(b"x")


def test_a_pickle_of_adapterhub_is_named(tmp_path: Path) -> None:
    """A folder with pytorch_adapter.bin alone is refused with the hint use_safetensors=True."""
    (tmp_path / CONFIG).write_bytes(MEMBERS[CONFIG])
    (tmp_path / "pytorch_adapter.bin").write_bytes(b"x")
    with pytest.raises(ArtifactError, match="use_safetensors=True"):
        read_folder(tmp_path)


@pytest.mark.parametrize("name", ["houlsby-norms", "pfeiffer-norm", "parallel-norms"])
def test_a_spoiled_tensor_of_adapterhub_is_refused_by_its_name(
    name: str, tiny_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Missing, extra, of wrong shape or type, not finite: as the contract has it for folders of PEFT."""
    parts = find_parts(HERE / "llama" / name)
    config = json.loads(parts[CONFIG].read_text())
    twins, tensors = (".adapter_down.0.", ".adapter_norm_before."), load_file(parts[WEIGHTS])
    for name in [name for name in tensors if twins[0] in name and name.replace(*twins) in tensors]:
        del tensors[name]  # the norm before has two names, and either will do
    assert_refused_by_name(config, tensors, tmp_path / "in", spec_of(tiny_of("llama")))
