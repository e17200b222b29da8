"""Models with OpenVLA's interface behind the policy protocol, against the models' own ways of generating."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import openvla_parts as parts
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import dynamic_module_utils

from counterpoint.actions.space import ActionSpace
from counterpoint.policies.observation import Observation, ObservationSpace
from counterpoint.policies.openvla import OpenVLAPolicy
from counterpoint.policies.openvla_bundle import OpenVLABundle, load_openvla
from counterpoint.selection.choice import decide
from counterpoint.selection.config import SelectionConfig
from counterpoint.selection.decision import Stream
from counterpoint.selection.decoding import sample_candidates

KINDS = ("llava", "paligemma", "remote")
ALLOWED = list(range(parts.VOCABULARY - parts.BINS, parts.VOCABULARY))
INSTRUCTIONS = ("pick up the red block", "pick up", "take the block up", "pick up the red robot")


def observation(instruction: str, seed: int) -> Observation:
    image = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return Observation({"image": image}, np.zeros(0, np.float32), instruction)


OBSERVATIONS = [observation(text, seed) for seed, text in enumerate(INSTRUCTIONS)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: getattr(parts, kind)(tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.fixture(scope="module")
def bundles(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, OpenVLABundle]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        return {
            kind: load_openvla(folder, "bridge", trust_remote_code=kind == "remote")
            for kind, folder in folders.items()
        }


def prompt_of(instruction: str) -> str:
    return f"In: What action should the robot take to {instruction}?\nOut:"


def generated(bundle: OpenVLABundle, seen: Observation, kind: str) -> list[int]:
    """The seven text ids that the model itself generates greedily among its action ids."""
    model = bundle.policy.model
    text = ("" if kind == "remote" else "<image>") + prompt_of(seen.instruction)
    found = bundle.processor(text=text, images=Image.fromarray(seen.images["image"]), return_tensors="pt")
    if kind != "remote":
        ids = model.generate(
            **{name: found[name] for name in found if name != "labels"},
            do_sample=False,
            max_new_tokens=7,
            prefix_allowed_tokens_fn=lambda *_: ALLOWED,
        )
        return ids[0, -7:].tolist()
    output = model(input_ids=found["input_ids"], pixel_values=found["pixel_values"], use_cache=True)
    ids = []
    for _ in range(7):
        ids.append(ALLOWED[int(output.logits[0, -1, ALLOWED].argmax())])
        output = model(torch.tensor([ids[-1:]]), past_key_values=output.past_key_values, use_cache=True)
    return ids


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_actions_are_those_that_the_model_itself_generates(
    kind: str, bundles: dict[str, OpenVLABundle]
) -> None:
    bundle = bundles[kind]
    streams = [Stream(seed, 0) for seed in range(len(OBSERVATIONS))]
    decisions = decide(bundle, OBSERVATIONS, streams, SelectionConfig(), 0)
    assert len({decision.tokens for decision in decisions}) > 1
    for seen, decision in zip(OBSERVATIONS, decisions, strict=True):
        with torch.inference_mode():
            ids = generated(bundle, seen, kind)
        assert [parts.VOCABULARY - 1 - token for token in decision.tokens[0]] == ids
        # From the text ids to a robot's units, as OpenVLA's authors describe it.
        edges = np.linspace(-1, 1, parts.BINS)
        middles = (edges[:-1] + edges[1:]) / 2
        scaled = middles[np.clip(parts.VOCABULARY - np.array(ids) - 1, 0, parts.BINS - 2)]
        low, high = np.array(parts.STATISTICS["q01"]), np.array(parts.STATISTICS["q99"])
        expected = np.where(parts.STATISTICS["mask"], 0.5 * (scaled + 1) * (high - low) + low, scaled)
        np.testing.assert_allclose(decision.actions, expected[None], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_cached_steps_agree_with_reading_everything_anew(
    kind: str, bundles: dict[str, OpenVLABundle]
) -> None:
    bundle, policy = bundles[kind], bundles[kind].policy
    tokens = torch.randint(parts.BINS, (4, 7), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        encoded = policy.encode(bundle.prepare(OBSERVATIONS))
        prefix = policy.prefill(encoded, ["none", "text"])
        found = [prefix.logits]
        for i in range(6):
            prefix = policy.advance(prefix, tokens[:, i].repeat(2))
            found.append(prefix.logits)
        told, untold = torch.stack(found, 1).chunk(2)
        told_anew = policy.logits(encoded, "none", tokens)
        untold_anew = policy.logits(encoded, "text", tokens)
    assert (told - told_anew).abs().max() < 1e-4
    assert (untold - untold_anew).abs().max() < 1e-4
    assert told_anew.dtype == torch.float32
    assert (told_anew - untold_anew).abs().max() > 0.1
    assert (told_anew[0] - told_anew[3]).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_without_caches_the_logits_are_those_of_the_model_as_it_is_called_by_others(
    kind: str, bundles: dict[str, OpenVLABundle]
) -> None:
    bundle, model = bundles[kind], bundles[kind].policy.model
    tokens = torch.tensor([[3, 0, 15, 7, 7, 1, 2]])
    for mask, name in (("none", "prompt"), ("text", "null_prompt")):
        with torch.inference_mode():
            inputs = bundle.prepare(OBSERVATIONS[1:2])
            found = bundle.policy.logits(bundle.policy.encode(inputs), mask, tokens)  # type: ignore[arg-type]
            ids = torch.cat([inputs[name], parts.VOCABULARY - 1 - tokens[:, :-1]], 1)
            more: dict[str, Any] = {}
            if kind == "paligemma":
                more["token_type_ids"] = (torch.arange(ids.shape[1]) >= inputs[name].shape[1]).long()[None]
            output = model(input_ids=ids, pixel_values=inputs["pixel_values"], **more)
        expected = output.logits[:, -7:][..., ALLOWED].flip(-1)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_else_is_in_the_batch_changes_nothing(kind: str, bundles: dict[str, OpenVLABundle]) -> None:
    bundle, policy = bundles[kind], bundles[kind].policy
    tokens = torch.randint(parts.BINS, (4,), generator=torch.Generator().manual_seed(0))

    def two_steps(chosen: slice) -> torch.Tensor:
        encoded = policy.encode(bundle.prepare(OBSERVATIONS[chosen]))
        return policy.advance(policy.prefill(encoded, ["none"]), tokens[chosen]).logits

    with torch.inference_mode():
        together = two_steps(slice(0, 4))
        for row in range(4):
            alone = two_steps(slice(row, row + 1))
            torch.testing.assert_close(together[row : row + 1], alone, atol=1e-4, rtol=0)


def encoder_of(policy: OpenVLAPolicy) -> torch.nn.Module:
    model = policy.model
    return model.vision_backbone if policy.inserts else model.model.vision_tower


@pytest.mark.parametrize("kind", KINDS)
def test_masked_condition_selection_encodes_each_image_once_and_scores_as_without_cache(
    kind: str, bundles: dict[str, OpenVLABundle]
) -> None:
    bundle, policy = bundles[kind], bundles[kind].policy
    seen: list[int] = []
    hook = encoder_of(policy).register_forward_hook(lambda _m, _i, out: seen.append(1))
    selection = SelectionConfig(rule="masked_condition", mask="text", candidates=3, first_tokens=4)
    streams = [Stream(5, 0), Stream(6, 1)]
    try:
        decisions = decide(bundle, OBSERVATIONS[:2], streams, selection, 0)
    finally:
        hook.remove()
    assert policy.encodes_once
    assert seen == [1]
    for row, decision in enumerate(decisions):
        with torch.inference_mode():
            encoded = policy.encode(bundle.prepare([OBSERVATIONS[row]] * 3))
            tokens = torch.tensor(decision.tokens)
            p = policy.logits(encoded, "none", tokens)[:, :4].double().log_softmax(-1)
            q = (policy.logits(encoded, "text", tokens)[:, :4].double() / 4).log_softmax(-1)
        expected = (q.exp() * (q - p)).sum((-1, -2))
        np.testing.assert_allclose(decision.confidences, expected, atol=1e-3)
        assert decision.chosen == int(expected.argmax())


def test_a_class_that_takes_no_features_is_given_the_image_for_each_mask(
    bundles: dict[str, OpenVLABundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, policy = bundles["llava"], bundles["llava"].policy
    with torch.inference_mode():
        inputs = bundle.prepare(OBSERVATIONS)
        expected = policy.prefill(policy.encode(inputs), ["none", "text"]).logits
        monkeypatch.setitem(policy._takes, "mm_encoder_outputs", False)
        assert not policy.encodes_once
        assert "pixel_values" in policy.encode(inputs)
        found = policy.prefill(policy.encode(inputs), ["none", "text"]).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_the_hidden_instruction_leaves_its_place_empty(bundles: dict[str, OpenVLABundle]) -> None:
    for bundle in bundles.values():
        inputs = bundle.prepare(OBSERVATIONS)
        ids = inputs["null_prompt"][2].tolist()
        kept = [word for word in bundle.processor.tokenizer.convert_ids_to_tokens(ids) if word[0] != "<"]
        assert kept == prompt_of("").replace(":", " :").replace("?", " ?").split()
    policy = bundles["llava"].policy
    for mask in ("state", "both"):
        with pytest.raises(ValueError, match="use text"):
            policy.prefill(policy.encode(inputs), [mask])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="use text"):
        decide(
            bundles["llava"],
            OBSERVATIONS[:1],
            [Stream(0, 0)],
            SelectionConfig(rule="masked_condition", mask="state"),
            0,
        )


def test_instructions_are_lowercased_and_a_stray_space_is_dropped(bundles: dict[str, OpenVLABundle]) -> None:
    bundle = bundles["llava"]
    told = bundle.prepare(
        [observation("pick up the red block", 0), observation(" Pick UP the red block ", 0)]
    )
    assert told["prompt"][0].tolist() == told["prompt"][1].tolist()


def test_actions_are_in_the_statistics_units_and_unmasked_dimensions_are_as_they_are(
    bundles: dict[str, OpenVLABundle],
) -> None:
    bundle = bundles["llava"]
    assert bundle.action_space.names == ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
    chunk, clipped = bundle.decode([0] * 7)
    half = 1 / 15
    np.testing.assert_allclose(
        chunk[0], [-1 + half, -0.5 + half / 2, half, 1 + 1.5 * half, -3 + 3 * half, 0.2, -1 + half], atol=1e-6
    )
    assert clipped == 0
    assert chunk.dtype == np.float32
    with pytest.raises(ValueError, match="6 tokens are not the 7"):
        bundle.decode([0] * 6)


def test_llamas_lone_space_ends_the_prompt_only_where_the_tokenizer_has_it(tmp_path: Path) -> None:
    size = 29872 + 16
    text = {"vocab_size": size + parts.PADDING}
    for special, last in (({29871: "▁"}, 29871), ({}, parts.WORDS.index(":"))):
        folder = tmp_path / f"space{len(special)}"
        bundle = load_openvla(parts.llava(folder, parts.words(special, size), text=text), "bridge")
        inputs = bundle.prepare(OBSERVATIONS[:1])
        assert inputs["prompt"][0, -1] == last
        assert inputs["null_prompt"][0, -1] == last


def test_statistics_beside_the_weights_come_before_those_of_the_configuration(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    for file in folders["llava"].iterdir():
        (tmp_path / file.name).symlink_to(file)
    finetuned = {"block": {"action": parts.STATISTICS | {"q99": [9.0] * 7}}}
    (tmp_path / "dataset_statistics.json").write_text(json.dumps(finetuned))
    bundle = load_openvla(tmp_path, "block")
    assert bundle.tokenizer.statistics.high == (9.0,) * 7
    assert load_openvla(tmp_path, "bridge").tokenizer.statistics.count == 123
    (tmp_path / "dataset_statistics.json").write_text("[")
    with pytest.raises(ValueError, match=r"dataset_statistics.json is no JSON object"):
        load_openvla(tmp_path, "bridge")


def test_spaces_of_the_caller_are_used_and_checked(folders: dict[str, Path]) -> None:
    cameras = ObservationSpace(cameras={"front": (20, 24)})
    bundle = load_openvla(folders["llava"], "bridge", observation_space=cameras)
    image = np.zeros((20, 24, 3), np.uint8)
    bundle.prepare([Observation({"front": image}, np.zeros(5, np.float32), "pick up")])
    with pytest.raises(ValueError, match="no camera 'front'"):
        bundle.prepare(OBSERVATIONS)
    two = ObservationSpace(cameras={"front": (16, 16), "wrist": (16, 16)})
    with pytest.raises(ValueError, match="looks through one"):
        load_openvla(folders["llava"], "bridge", observation_space=two)
    space = ActionSpace(names=("x", "y"), low=(-1, -1), high=(1, 1))
    with pytest.raises(ValueError, match=r"2 dimensions, norm_stats\['bridge'\] 7"):
        load_openvla(folders["llava"], "bridge", action_space=space)


def test_a_chunk_of_several_steps_has_a_token_for_each(folders: dict[str, Path]) -> None:
    names = tuple("abcdefg")
    space = ActionSpace(names=names, low=(-5,) * 7, high=(5,) * 7, horizon=2, execute=2)
    bundle = load_openvla(folders["llava"], "bridge", action_space=space)
    with torch.inference_mode():
        found = sample_candidates(bundle.policy, bundle.prepare(OBSERVATIONS[:1]), None, SelectionConfig())
    assert found.tokens.shape == (1, 1, 14)
    assert bundle.decode(found.tokens[0, 0].tolist())[0].shape == (2, 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_action_bins": None}, "config.json has no n_action_bins"),
        ({"pad_to_multiple_of": None}, "config.json has no pad_to_multiple_of"),
        ({"norm_stats": None}, "config.json has no norm_stats"),
        ({"n_action_bins": 1000}, "n_action_bins=1000 and 96 text tokens"),
        (
            {"norm_stats": {"other": {}}},
            r"unnorm_key='bridge' is not among the model's statistics: \['other'\]",
        ),
        ({"norm_stats": {"bridge": {"action": {"q01": [0]}}}}, r"norm_stats\['bridge'\]\['action'\] .*q99"),
        (
            {"norm_stats": {"bridge": {"action": {"q01": [0, 0], "q99": [1]}}}},
            "statistics.high has 1 entries",
        ),
        ({"model_type": "nonsense"}, "cannot be loaded by transformers"),
    ],
)
def test_folders_of_other_models_are_refused(
    change: dict[str, object], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    for file in folders["llava"].iterdir():
        if file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    config = json.loads((folders["llava"] / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as caught:
        load_openvla(tmp_path, "bridge")
    assert "\n" not in str(caught.value)


def test_code_from_a_folder_runs_only_if_trusted(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be loaded by transformers"):
        load_openvla(folders["remote"], "bridge")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_openvla(tmp_path / "nowhere", "bridge")


@pytest.mark.parametrize("damage", ["lacking", "corrupt", "absent"])
def test_weights_that_are_not_whole_are_refused(
    damage: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    for file in folders["llava"].iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).symlink_to(file)
    whole = folders["llava"] / "model.safetensors"
    if damage == "lacking":
        tensors = load_file(whole)
        del tensors[sorted(tensors)[0]]
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    elif damage == "corrupt":
        (tmp_path / "model.safetensors").write_bytes(whole.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be loaded by transformers") as caught:
        load_openvla(tmp_path, "bridge")
    assert "\n" not in str(caught.value)
    if damage == "lacking":
        assert "the weights lack" in str(caught.value)


def test_code_for_another_version_is_answered_with_one_line(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    for file in folders["remote"].iterdir():
        shutil.copy(file, tmp_path)
    with (tmp_path / "remote_code.py").open("a") as code:
        code.write("\n\nraise TypeError('written for\\nanother version')\n")
    with pytest.raises(ValueError, match=r"by transformers .*written for another version") as caught:
        load_openvla(tmp_path, "bridge", trust_remote_code=True)
    assert "\n" not in str(caught.value)
