"""The laws of every served method, as a class of tests: a method is a subclass that states its own cases.

    class TestMiss(LinearContract):
        PEFT_TYPE, NAME, PEFT, SCHEMA = "MISS", "MiSS", PeftMissConfig, MissConfig
        ...

`test_method_contract` refuses a method of `METHODS` that has no such class.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest
import torch
from torch import Tensor

from adapters_store.base.spec import BaseSpec
from adapters_store.errors import ArtifactError
from adapters_store.format.folder import CONFIG, Artifact, read_folder
from adapters_store.methods import METHODS
from adapters_store.methods.compile import compile_patch
from adapters_store.methods.shared import config as shared_config
from adapters_store.methods.shared.expect import PREFIX
from adapters_store.methods.shared.idle import idle_primitives
from adapters_store.methods.shared.targets import is_named, layer_of
from adapters_store.methods.shared.unused_tensors import unused_tensors, with_grad_tracking
from adapters_store.primitives import Patch, Prefix
from tests.adapters_store.methods.spoil import assert_refused_by_name, one_of_a_kind
from tests.kit.adapters import make_peft
from tests.kit.families import FAMILIES
from tests.kit.forge import spec_of, toy_spec
from tests.kit.like_peft import assert_answers_as_peft, assert_every_key_is_judged, changed
from tests.kit.steps import CountedText, count_steps

TinyOf = Callable[[str], Path]
Made = Callable[[str, int], Path]
Spoiled = tuple[str, int] | None  # a family of the kit and a seed; none: `sound`
Values = Mapping[str, Any]
TensorsCase = tuple[
    Values, Mapping[str, Tensor | None], str, str
]  # config, tensors, the refused name ("": any), reason
ConfigCase = tuple[Values, str] | tuple[Values, str, str]  # config, reason, the refusal's code (none: any)
ENDS = ["lora_A.weight", "lora_A.default.weight", "lora_E", "lora_embedding_A", "lora_magnitude_vector", "hada_w1_a"]
ENDS += ["lokr_w1", "vera_lambda_d", "ia3_l", "beft_bias", "miss_block", "oft_R.weight", "oft_r"]
ENDS += ["ln_tuning_layers.weight", "trainable_tokens_delta", "bottleneck_up.bias", "base_layer.bias"]
WRONG_VALUES: Sequence[Any] = (True, 1, 2.5, "2", [3], {"a": 1})
NO_VALUE: Any = [[{}]]  # of no key
SEEDS = (0, 1)  # every family's options vary with it
MAX_STEPS = 150  # of one name more in a config: a few for each of its characters
FEW, MANY = 20, 80  # names


class MethodContract:
    """The laws that any method keeps, whatever it compiles to."""

    PEFT_TYPE: ClassVar[str]
    NAME: ClassVar[str]  # as refusals call the method
    SCHEMA: ClassVar[type[msgspec.Struct]]
    PEFT: ClassVar[Any] = None  # PEFT's config class, if the method is PEFT's
    IGNORED_KEYS: ClassVar[Collection[str]] = ()
    JUDGED: ClassVar[Collection[str]] = ()  # silent keys whose values are looked at all the same
    SERVED_VALUES: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    FAMILIES: ClassVar[Sequence[str]] = ()  # of the kit; the first is the one of FAMILY_ON
    FAMILY_ON: ClassVar[Sequence[tuple[str, int]]] = ()  # kinds of bases, and seeds, that answer as in PEFT
    SEED: ClassVar[int | None] = None  # of the cases; none: another for each kind of base
    FILL: ClassVar[staticmethod[[str, Tensor, torch.Generator], Tensor] | None] = None  # a `Fill` of the kit
    BASE: ClassVar[str] = "llama"  # the kind that `sound` is made for
    SOUND: ClassVar[Values] = {}  # the config of `sound`
    MAY_MISS: ClassVar[str] = "$^"  # an expression of the tensors that need not be there
    UNTRAINED: ClassVar[str] = ""  # an expression of tensors that are 0 before training; "": PEFT initialises it
    CASES: ClassVar[Mapping[str, tuple[str, Values]]] = {}  # a kind of base and a config, which answer as in PEFT
    TENSORS: ClassVar[Mapping[str, TensorsCase]] = {}
    CONFIGS: ClassVar[Mapping[str, ConfigCase]] = {}

    @classmethod
    def make(cls, folder: Path, base: Path, seed: int = 0, **config: Any) -> Path:
        """Write a random artifact of a config."""
        return make_peft(folder, base, cls.PEFT(task_type="CAUSAL_LM", **config), seed, cls.FILL)

    def assert_answers(self, base: Path, folder: Path) -> Patch:
        """Compare the logits of a folder's patch with those of PEFT's model."""
        return assert_answers_as_peft(base, folder)

    @pytest.fixture(scope="class")
    @classmethod
    def sound(cls, tmp_path_factory: pytest.TempPathFactory, tiny_of: TinyOf) -> Artifact:
        """An artifact that is accepted, for the tests to spoil."""
        return read_folder(cls.make(tmp_path_factory.mktemp("sound") / "hat", tiny_of(cls.BASE), **cls.SOUND))

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls, tiny_of: TinyOf) -> BaseSpec:
        """The base that `sound` was made for."""
        return spec_of(tiny_of(cls.BASE))

    def test_the_costs_of_a_config_and_of_a_base_add_up(self, sound: Artifact, spec: BaseSpec) -> None:
        """A name more in any list or table of a config costs a few steps, however many sites the base has."""
        for field in msgspec.structs.fields(self.SCHEMA):
            for few, many in zip(*(grown(field, sound, spec, count) for count in (FEW, MANY)), strict=True):
                costs = [cost_of(changed(sound, {field.encode_name: names}, {}), spec) for names in (few, many)]
                assert costs[1] - costs[0] <= MAX_STEPS * (MANY - FEW), field.encode_name

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Parametrise each test by its table of this class."""
        families = {f"family on {kind}, {seed}": (kind, seed) for kind, seed in self.FAMILY_ON}
        tables: Mapping[str, Mapping[str, Any]] = {
            "answered": {**self.CASES, **families},
            "tensors_case": self.TENSORS,
            "config_case": {name: (*case, "")[:3] for name, case in self.CONFIGS.items()},
            "spoiled": {"sound": None} | {f"{name}, {seed}": (name, seed) for name in self.FAMILIES for seed in SEEDS},
        }
        for argument in tables.keys() & set(metafunc.fixturenames):
            metafunc.parametrize(argument, list(tables[argument].values()), ids=list(tables[argument]))

    def test_the_answers_are_those_of_peft(
        self, tmp_path: Path, tiny_of: TinyOf, answered: tuple[str, Values | int]
    ) -> None:
        """A patch gives PEFT's logits for every base and option, and depends on all tensors."""
        kind, config = answered
        folder, base = tmp_path / "hat", tiny_of(kind)
        if isinstance(config, int):
            FAMILIES[self.FAMILIES[0]](folder, base, config)
        else:
            self.make(folder, base, len(kind) if self.SEED is None else self.SEED, **config)
        self.assert_answers(base, folder)

    def test_a_patch_is_all_of_its_artifact(self, sound: Artifact, spec: BaseSpec) -> None:
        """A patch has digest, method, all parameters, finite fp32, a primitive per kind and site, no unused tensor."""
        followed = with_grad_tracking(sound)
        patch = compile_patch(followed, spec)
        assert (patch.digest, patch.method) == (sound.digest, METHODS[self.PEFT_TYPE].name)
        assert patch.num_parameters == sum(tensor.numel() for tensor in sound.tensors.values())
        assert unused_tensors(followed, patch) == [] and patch.primitives
        assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in floats(patch))
        places = {(type(primitive), getattr(primitive, "site", "")) for primitive in patch.primitives}
        assert len(places) == len(patch.primitives)

    def untrained(self, sound: Artifact, folder: Path, base: Path) -> Artifact:
        """Return `sound` as it is before training, when it changes nothing."""
        if self.UNTRAINED:
            zeros = {name: 0 * tensor for name, tensor in sound.tensors.items() if re.search(self.UNTRAINED, name)}
            return changed(sound, {}, zeros)
        config = self.PEFT(task_type="CAUSAL_LM", **self.SOUND)
        return read_folder(make_peft(folder, base, config, 0, lambda _name, value, _: value))

    def test_what_is_not_trained_changes_nothing(
        self, sound: Artifact, spec: BaseSpec, tmp_path: Path, tiny_of: TinyOf
    ) -> None:
        """An artifact that was never trained is refused, or all its primitives but a prefix are found idle."""
        assert idle_primitives(compile_patch(sound, spec)) == []
        untrained = self.untrained(sound, tmp_path / "hat", tiny_of(self.BASE))
        try:
            patch = compile_patch(untrained, spec)
        except ArtifactError as error:
            assert str(error).endswith("the artifact changes nothing")
        else:
            assert idle_primitives(patch) == [one for one in patch.primitives if not isinstance(one, Prefix)]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_computed_in_fp32(self, sound: Artifact, spec: BaseSpec, dtype: torch.dtype) -> None:
        """Tensors in 16 bits compile to the very numbers of the same values in 32."""
        halves = {
            name: tensor.to(dtype) for name, tensor in sound.tensors.items() if not re.search(self.MAY_MISS, name)
        }
        singles = {name: tensor.float() for name, tensor in halves.items()}
        ours, theirs = (compile_patch(changed(sound, {}, tensors), spec) for tensors in (halves, singles))
        assert is_same(ours, theirs)

    def test_every_key_that_peft_writes_is_judged(self) -> None:
        """Every key of the installed PEFT's config is known: a new PEFT that adds one turns this red."""
        if self.PEFT is not None:
            assert_every_key_is_judged(self.PEFT, self.SCHEMA, self.IGNORED_KEYS, self.SERVED_VALUES)

    def test_a_silent_key_cannot_change_the_answer(self, sound: Artifact, spec: BaseSpec) -> None:
        """A key that is ignored may have any value: the patch is the same."""
        patch = compile_patch(sound, spec)
        for key in {*shared_config.IGNORED_KEYS, *self.IGNORED_KEYS} - {"peft_type", *self.JUDGED}:
            for value in (*WRONG_VALUES, None):
                assert is_same(compile_patch(changed(sound, {key: value}, {}), spec), patch), key

    @pytest.mark.parametrize("key", ["auto_map", "magic", "path", "R"])
    def test_an_unknown_key_is_refused_by_name(self, sound: Artifact, spec: BaseSpec, key: str) -> None:
        """A key that no PEFT is known to write may change the answer."""
        with pytest.raises(ArtifactError, match=f"a key that is not known: {key}") as caught:
            compile_patch(changed(sound, {key: "x"}, {}), spec)
        assert (caught.value.code, caught.value.param) == ("method_unsupported", key)

    def test_an_unknown_key_that_is_not_used_is_passed_over(self, sound: Artifact, spec: BaseSpec) -> None:
        """A newer PEFT's key that is null, false or empty is taken, and told; so is another trainer's, of any value.

        Any other value of such a key, zero too, is refused by name.
        """
        patch = compile_patch(sound, spec)
        unused: list[Any] = [None, False, "", [], {}]
        for key, values in {"use_magic": unused, **dict.fromkeys(shared_config.OTHERS_KEYS, WRONG_VALUES)}.items():
            for value in values:
                artifact = dataclasses.replace(changed(sound, {key: value}, {}), idle_keys=set())
                assert is_same(compile_patch(artifact, spec), patch), (key, value)
                assert artifact.idle_keys == {key}
        for value in (0, 1, 0.0, True, "x", [0], {"a": 1}):
            with pytest.raises(ArtifactError, match="a key that is not known: use_magic"):
                compile_patch(changed(sound, {"use_magic": value}, {}), spec)

    def test_an_option_that_is_not_served_is_refused_by_name(self, sound: Artifact, spec: BaseSpec) -> None:
        """An option is accepted with its served values only; the refusal names method and key."""
        for key, values in {**shared_config.SERVED_VALUES, **self.SERVED_VALUES}.items():
            for value in values:
                compile_patch(changed(sound, {key: value}, {}), spec)
            for value in (0, 1, 2.5, "of another kind", ["lm_head"], {"a": 1}, *([] if True in values else [True])):
                self.refuse(changed(sound, {key: value}, {}), spec, key, value)

    def refuse(self, artifact: Artifact, spec: BaseSpec, key: str, value: Any) -> None:
        """Assert that a value of a key is refused as not served."""
        reason = f"{self.NAME} with {key}={value} is not served"
        with pytest.raises(ArtifactError, match=re.escape(reason)) as caught:
            compile_patch(artifact, spec)
        assert (caught.value.code, caught.value.param) == ("method_unsupported", key)

    def test_a_value_of_another_type_is_refused_by_its_place(self, sound: Artifact, spec: BaseSpec) -> None:
        """Each key that is read is checked for its type, and no number is taken for true or true for a number."""
        for field in msgspec.structs.fields(self.SCHEMA):
            for value in (NO_VALUE, *(value for value in WRONG_VALUES if not fits(value, field.type))):
                if field.encode_name not in self.SERVED_VALUES:
                    with pytest.raises(ArtifactError, match=rf"\$\.{field.encode_name}\b") as caught:
                        compile_patch(changed(sound, {field.encode_name: value}, {}), spec)
                        pytest.fail(f"{field.encode_name}={value!r} was taken")
                    assert (caught.value.code, caught.value.param) == ("artifact_invalid", CONFIG)

    def test_a_spoiled_tensor_is_refused_by_its_name(
        self, spoiled: Spoiled, sound: Artifact, spec: BaseSpec, biased_base: Path, artifact: Made, tmp_path: Path
    ) -> None:
        """Missing, extra, of wrong shape or type, not finite: for each kind of tensor, through the real intake.

        So it is with `sound`, and with what the kit makes of this method for a base with biases.
        """
        made = sound if spoiled is None else read_folder(artifact(*spoiled))
        assert made.config["peft_type"] == self.PEFT_TYPE
        base = spec if spoiled is None else spec_of(biased_base)
        assert_refused_by_name(made.config, made.tensors, tmp_path / "in", base, self.MAY_MISS)

    def test_a_tensor_of_another_method_is_refused_by_its_name(self, sound: Artifact, spec: BaseSpec) -> None:
        """A tensor that the method does not know is refused, also at a site that it acts on."""
        known = {re.sub(r"\d+", "", name) for name in sound.tensors}
        for end in ENDS:
            name = f"{PREFIX}{site_of(next(iter(sound.tensors)), spec)}.{end}"
            if re.sub(r"\d+", "", name) not in known:
                with pytest.raises(ArtifactError, match=rf"{re.escape(name)}\b.*(is extra|no site)") as caught:
                    compile_patch(changed(sound, {}, {name: torch.ones(4, 64)}), spec)
                    pytest.fail(f"{name} was taken")
                assert (caught.value.code, caught.value.param) == ("artifact_invalid", name)

    def test_an_artifact_without_tensors_is_refused(self, sound: Artifact, spec: BaseSpec) -> None:
        """An adapter that would be the base is none."""
        with pytest.raises(ArtifactError, match=r"is missing|no tensors"):
            compile_patch(changed(sound, {}, dict.fromkeys(sound.tensors)), spec)

    def test_an_artifact_of_another_base_is_refused(self, sound: Artifact, spec: BaseSpec, tiny_of: TinyOf) -> None:
        """A base of other widths is never taken for the one that the artifact was trained on."""
        with pytest.raises(ArtifactError):
            compile_patch(sound, toy_spec() if spec.name != "toy" else spec_of(tiny_of("llama")))

    def test_what_overflows_is_refused_by_name(self, sound: Artifact, spec: BaseSpec) -> None:
        """Values at the end of fp32's range, in one kind of tensor or in all, give finite numbers or a refusal."""
        names = [name for name in one_of_a_kind(sound.tensors) if not re.search(self.MAY_MISS, name)]
        for chosen in [*([name] for name in names), names]:
            huge = {name: torch.full(sound.tensors[name].shape, 3e38) for name in chosen}
            try:
                patch = compile_patch(changed(sound, {}, huge), spec)
            except ArtifactError as error:
                named = set().union(*map(as_refusals_say, sound.tensors))
                assert error.param in named and f"{error.param} overflows" in str(error), chosen
            else:
                assert all(tensor.isfinite().all() for tensor in floats(patch)), chosen

    def test_config_tensors_and_base_must_agree(
        self, sound: Artifact, spec: BaseSpec, tensors_case: TensorsCase
    ) -> None:
        """A tensor without its site, a site without its tensor, a wrong shape or rank: refused by the tensor's name."""
        config, tensors, name, reason = tensors_case
        with pytest.raises(ArtifactError, match=reason) as caught:
            compile_patch(changed(sound, config, tensors), spec)
        assert not name or caught.value.param == name
        assert caught.value.param is not None and caught.value.param in str(caught.value)

    def test_what_is_not_served_is_refused_by_name(
        self, sound: Artifact, spec: BaseSpec, config_case: tuple[Values, str, str]
    ) -> None:
        """A key or a value that may change the answer is never ignored; numbers are bounded; the key is named."""
        config, reason, code = config_case
        with pytest.raises(ArtifactError, match=reason) as caught:
            compile_patch(changed(sound, config, {}), spec)
        assert caught.value.code == code or not code
        assert caught.value.param is not None
        assert caught.value.param in str(caught.value) or caught.value.param in self.JUDGED
        keys = {field.encode_name for field in msgspec.structs.fields(self.SCHEMA)}
        known = {CONFIG, *keys, *self.JUDGED, *sound.config, *config, *sound.tensors}
        assert caught.value.param in known or caught.value.param.startswith(PREFIX)


class LinearContract(MethodContract):
    """The laws of a method that acts on linears named by target_modules; `SOUND` names them in a list."""

    def test_a_conv1d_is_refused_or_answers_as_in_peft(self, sound: Artifact, tiny_of: TinyOf) -> None:
        """A Conv1D is refused if PEFT does not have the method for it: the meaning of its tensors is not guessed."""
        if "gpt2" not in {kind for kind, _ in (*self.CASES.values(), *self.FAMILY_ON)}:
            first = next(iter(sound.tensors))
            site = PREFIX + site_of(first, spec_of(tiny_of(self.BASE)))
            ends = [name.removeprefix(site) for name in sound.tensors if name.startswith(f"{site}.")]
            names = [f"{PREFIX}transformer.h.0.attn.c_attn{end}" for end in ends]
            tensors = {**dict.fromkeys(sound.tensors), **{name: torch.ones(2, 2) for name in names}}
            with pytest.raises(ArtifactError, match=r"c_attn.* acts on a Conv1D") as caught:
                compile_patch(changed(sound, {}, tensors), spec_of(tiny_of("gpt2")))
            assert caught.value.code == "method_unsupported" and caught.value.param in names

    def test_sites_of_another_base_are_refused_by_name(self, sound: Artifact, tiny_of: TinyOf) -> None:
        """A tensor whose linear the base does not have is named."""
        other = "gpt2" if self.BASE == "llama" else "llama"
        with pytest.raises(ArtifactError, match=f"has no site in {other}") as caught:
            compile_patch(sound, spec_of(tiny_of(other)))
        assert caught.value.param in sound.tensors and caught.value.param in str(caught.value)

    def test_the_sites_are_those_that_the_config_names(self, sound: Artifact, spec: BaseSpec) -> None:
        """A target without tensors, and tensors at a site that is no target, excluded or of another layer: refused."""
        site = site_of(next(iter(sound.tensors)), spec)
        others = [name for name in sound.config["target_modules"] if not is_named(site, [name])]
        without = {name: None for name in sound.tensors if name.startswith(f"{PREFIX}{site}.")}
        with pytest.raises(ArtifactError, match=rf"{re.escape(site)}\..* is missing: target_modules names its site"):
            compile_patch(changed(sound, {}, without), spec)
        targets = sound.config["target_modules"]
        more = next(site for site in spec.linears if not is_named(site, targets))
        configs: list[tuple[Values, str]] = [
            ({"target_modules": [*others, "nothing"]}, "is extra"),
            ({"exclude_modules": [site]}, "is extra"),
            ({"exclude_modules": site}, "is extra"),
            ({"target_modules": site}, "is extra"),
            ({"target_modules": [*targets, more]}, "is missing"),
        ]
        if "layers_to_transform" in {field.name for field in msgspec.structs.fields(self.SCHEMA)}:
            layer = layer_of(site)
            assert layer is not None
            configs.append(({"layers_to_transform": [layer + 1]}, "is extra"))
        for config, reason in configs:
            with pytest.raises(ArtifactError, match=f"{reason}.*target_modules") as caught:
                compile_patch(changed(sound, config, {}), spec)
                pytest.fail(f"{config} was taken")
            assert caught.value.param is not None and caught.value.param in str(caught.value)
            assert (caught.value.param in sound.tensors) == (reason == "is extra")

    def test_an_expression_is_never_run(self, sound: Artifact, spec: BaseSpec) -> None:
        """A regular expression is never run: the tensors alone decide which sites are changed."""
        patch = compile_patch(sound, spec)
        for config in ({"target_modules": "(a+)+$"}, {"exclude_modules": "(a+)+$"}):
            assert is_same(compile_patch(changed(sound, config, {}), spec), patch)


def grown(field: msgspec.structs.FieldInfo, sound: Artifact, spec: BaseSpec, count: int) -> Iterator[Any]:
    """The values of a key that are long: names, a table of names, and numbers, as far as the key takes them."""
    names = [CountedText(f"{number:02}") for number in range(count)]
    present = sound.config.get(field.encode_name)
    numbers = [*range(len(spec.layers)), *range(1000, 1000 + count)]
    for value in ([*present, *names] if isinstance(present, list) else names, dict.fromkeys(names, 1), numbers):
        with contextlib.suppress(msgspec.ValidationError):
            yield msgspec.convert(value, field.type)


def cost_of(artifact: Artifact, spec: BaseSpec) -> int:
    """The steps of compiling an artifact, or of refusing it."""

    def compile_or_refuse() -> None:
        with contextlib.suppress(ArtifactError):
            compile_patch(artifact, spec)

    return count_steps(compile_or_refuse)


def on(kind: str, cases: Mapping[str, Values]) -> dict[str, tuple[str, Values]]:
    """Cases of one kind of base."""
    return {name: (kind, case) for name, case in cases.items()}


def split_extras(rows: Mapping[str, tuple[Any, ...]]) -> tuple[dict[str, TensorsCase], dict[str, ConfigCase]]:
    """Split rows of config, tensors, name (or none) and reason into a table with tensors and one of configs alone."""
    of_tensors, of_configs = dict[str, TensorsCase](), dict[str, ConfigCase]()
    for case, (config, tensors, *name, reason) in rows.items():
        if tensors or any(name):
            of_tensors[case] = (config, tensors, "".join(name), reason)
        else:
            of_configs[case] = (config, reason)
    return of_tensors, of_configs


def as_refusals_say(name: str) -> set[str]:
    """Return the names that a refusal may give a tensor: its own, or that of the base's parameter it replaces."""
    plain = name.replace(".ln_tuning_layers.", ".").replace(".token_adapter.", ".")
    return {name, plain, plain.removeprefix(PREFIX)}


def fits(value: Any, kind: Any) -> bool:
    """Tell if a type takes a value, as a config's key of it would."""
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return False
    return True


def floats(patch: Patch) -> list[Tensor]:
    """Return every floating-point tensor in a patch's primitives, in order."""
    return [tensor for tensor in flat(patch.primitives) if isinstance(tensor, Tensor) and tensor.is_floating_point()]


def flat(thing: Any) -> Iterator[Any]:
    """Yield everything in primitives and in their tuples, one by one."""
    if dataclasses.is_dataclass(thing):
        thing = tuple(getattr(thing, field.name) for field in dataclasses.fields(thing))
    if isinstance(thing, tuple | list):
        for part in thing:
            yield from flat(part)
    else:
        yield thing


def is_same(one: Patch, other: Patch) -> bool:
    """Tell if two patches have the same primitives, bit for bit."""
    pairs = zip(flat(one.primitives), flat(other.primitives), strict=True)
    return all(is_equal(*pair) for pair in pairs)


def is_equal(one: Any, other: Any) -> bool:
    """Tell if two fields of primitives are the same, tensors also by their type."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)


def site_of(name: str, spec: BaseSpec) -> str:
    """Return the linear that a tensor's name begins with, or the first linear if there is none."""
    sites = [site for site in spec.linears if name.startswith(f"{PREFIX}{site}.")]
    return (sites or list(spec.linears))[0]
