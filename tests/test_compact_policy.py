"""The compact policy: cached equals uncached, rows are alone, and a masked condition is not seen."""

import pytest
import torch
from torch import Tensor
from vla_parts import inputs_of, policy, squares, words

from counterpoint.policies.compact import CompactConfig, CompactPolicy
from counterpoint.policies.masks import MASKS, Mask
from counterpoint.policies.observation import ObservationSpace
from counterpoint.policies.policy import Inputs
from counterpoint.policies.prefix import join
from counterpoint.policies.vision import VisionConfig, cell_of

KINDS = ("pointer", "patches")
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
COLOURS = ("red", "green", "blue")


def told(cameras: int = 1, episodes: int = 3) -> dict[str, Tensor]:
    inputs = inputs_of(squares(episodes, 1))
    more = [inputs["images"], inputs["images"].flip(2)][:cameras]
    return inputs | {"images": torch.cat(more, 1)}


def random_tokens(network: CompactPolicy, rows: int) -> Tensor:
    stream = torch.Generator().manual_seed(1)
    return torch.randint(network.vocabulary, (rows, network.max_tokens), generator=stream)


def decoded(network: CompactPolicy, encoded: Inputs, masks: list[Mask], tokens: Tensor) -> Tensor:
    """Logits [len(masks),B,L,V] by way of the cache."""
    prefix = network.prefill(encoded, masks)
    found = []
    for i in range(tokens.shape[1]):
        found.append(prefix.logits)
        prefix = network.advance(prefix, tokens[:, i].repeat(len(masks)))
    return torch.stack(found, 1).unflatten(0, (len(masks), len(tokens)))


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cameras", [("front",), ("front", "wrist")])
def test_cached_logits_are_the_uncached_ones_under_every_mask(kind: str, cameras: tuple[str, ...]) -> None:
    network = policy(kind, cameras=cameras)
    encoded = network.encode(told(len(cameras)))
    tokens = random_tokens(network, 3)
    cached = decoded(network, encoded, list(MASKS), tokens)
    for index, mask in enumerate(MASKS):
        torch.testing.assert_close(cached[index], network.logits(encoded, mask, tokens), **CLOSE)
    assert cached.dtype == torch.float32
    assert cached.std(0).mean() > 0.01  # the masks make a difference


def test_repeated_picked_and_joined_rows_go_on_as_they_would_have() -> None:
    network = policy()
    encoded = network.encode(told())
    tokens = random_tokens(network, 3)
    whole = network.logits(encoded, "none", tokens)
    short = network.prefill(encoded, ["none"])
    long = network.advance(short, tokens[:, 0])
    both = join([long, short]).repeat(2).pick(torch.tensor([0, 11]))
    after = network.advance(both, torch.stack([tokens[0, 1], tokens[2, 0]]))
    torch.testing.assert_close(after.logits, torch.stack([whole[0, 2], whole[2, 1]]), **CLOSE)


def test_a_logit_depends_on_earlier_tokens_only() -> None:
    network = policy()
    encoded = network.encode(told())
    tokens = random_tokens(network, 3)
    before = network.logits(encoded, "none", tokens)
    for i in range(network.max_tokens):
        changed = tokens.clone()
        changed[:, i] = (changed[:, i] + 1) % network.vocabulary
        moved = (network.logits(encoded, "none", changed) - before).abs().amax((0, 2)) > 1e-6
        assert moved.tolist() == [j > i for j in range(network.max_tokens)]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_depend_on_their_neighbours(kind: str) -> None:
    network = policy(kind)
    inputs = told(episodes=5)
    tokens = random_tokens(network, 5)
    together = network.logits(network.encode(inputs), "none", tokens)
    for row in range(5):
        one = {name: x[row : row + 1] for name, x in inputs.items()}
        alone = network.logits(network.encode(one), "none", tokens[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_masked_is_not_seen(kind: str) -> None:
    network = policy(kind)
    inputs = told()
    tokens = random_tokens(network, 3)
    # Other words, one of them shorter, and another state.
    texts = ["pick up the blue block", "pick up red", "pick up the green block"]
    others = inputs | {"words": words(texts), "state": inputs["state"] * 3 - 1}
    for changed, blind in (("words", ("text", "both")), ("state", ("state", "both"))):
        other = network.encode(inputs | {changed: others[changed]})
        for mask in MASKS:
            here = network.logits(network.encode(inputs), mask, tokens)
            there = network.logits(other, mask, tokens)
            assert torch.equal(here, there) is (mask in blind)


def test_the_pointer_is_steered_by_the_words_and_null_by_nothing() -> None:
    network = policy()
    inputs = told()
    asked = [network.encode(inputs | {"words": words([f"the {colour}"] * 3)}) for colour in COLOURS]
    assert not torch.allclose(asked[0]["pointer"], asked[1]["pointer"])
    for name in ("slots", "null_pointer"):
        assert torch.equal(asked[0][name], asked[1][name])
    swapped = network.encode(inputs | {"words": words(["red the"] * 3)})
    torch.testing.assert_close(swapped["pointer"], asked[0]["pointer"])


def test_training_hides_what_masks_hide() -> None:
    network = policy()
    inputs = told(episodes=4)
    tokens = random_tokens(network, 4)
    text, state = torch.tensor([False, True, False, True]), torch.tensor([False, False, True, True])
    mixed = network(inputs, tokens, text, state)
    encoded = network.encode(inputs)
    for row, mask in enumerate(MASKS):
        torch.testing.assert_close(mixed[row], network.logits(encoded, mask, tokens)[row], **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("text", "state", "refused"), [(False, True, "text"), (True, False, "state"), (False, False, "both")]
)
def test_a_policy_may_lack_conditions(kind: str, text: bool, state: bool, refused: Mask) -> None:
    network = policy(kind, text=text, state=state)
    assert network.conditions == {name for name, has in (("text", text), ("state", state)) if has}
    encoded = network.encode(told())
    tokens = random_tokens(network, 3)
    torch.testing.assert_close(
        decoded(network, encoded, ["none"], tokens)[0], network.logits(encoded, "none", tokens), **CLOSE
    )
    for call in (
        lambda: network.prefill(encoded, ["none", refused]),
        lambda: network.logits(encoded, refused, tokens),
    ):
        with pytest.raises(ValueError, match=rf"mask={refused} hides .* which this policy is never told"):
            call()


def test_weights_follow_from_the_seed_and_travel_as_a_state_dict() -> None:
    torch.manual_seed(3)
    first = policy(seed=5)
    torch.manual_seed(4)
    state = first.state_dict()
    assert all(torch.equal(x, policy(seed=5).state_dict()[name]) for name, x in state.items())
    other = policy(seed=6)
    first.standardise_state(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 1.0, 0.0]))
    other.load_state_dict(first.state_dict())
    tokens, inputs = random_tokens(first, 3), told()
    assert torch.equal(first(inputs, tokens), other(inputs, tokens))
    moved = inputs | {
        "state": inputs["state"] * torch.tensor([2.0, 1.0, 1.0]) + torch.tensor([1.0, 2.0, 3.0])
    }
    plain = policy(seed=5)
    torch.testing.assert_close(first(moved, tokens), plain(inputs, tokens), **CLOSE)


def test_parts_that_do_not_fit_are_refused() -> None:
    space = ObservationSpace(cameras={"front": (32, 32), "wrist": (16, 16)})
    with pytest.raises(ValueError, match=r"differ in size"):
        CompactPolicy(CompactConfig(), space, 8, None, 4, 8, 5)
    space = ObservationSpace(cameras={"front": (30, 30)})
    with pytest.raises(ValueError, match=r"text=true with words_vocabulary=0 and words_length=5"):
        CompactPolicy(CompactConfig(), space, 8, None, 4, 0, 5)
    with pytest.raises(ValueError, match=r"vision\.patch=8 does not divide images of 30x30"):
        CompactPolicy(CompactConfig(vision=VisionConfig(kind="patches")), space, 8, None, 4, 8, 5)
    with pytest.raises(ValueError, match=r"hidden=100 must be an even multiple of heads=4"):
        CompactPolicy(CompactConfig(hidden=100), space, 8, None, 4, 8, 5)


@pytest.mark.parametrize("size", [(32, 32), (20, 48)])
def test_a_pointer_finds_what_its_query_alone_resembles(size: tuple[int, int]) -> None:
    # A query that resembles one cell much more than any other returns that cell's place and features.
    network = policy().vision
    height, width = size[0] // 4, size[1] // 4
    image = torch.randint(
        0, 256, (1, 1, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    cells = network.convolutions(image[:, 0].permute(0, 3, 1, 2).float() / 127.5 - 1).flatten(2)[0].T
    cell = int(torch.argmax(cells.norm(dim=1)))
    network.slots[0] = 1e4 * cells[cell]
    network.offset.weight.zero_()
    network.offset.bias.copy_(torch.tensor([0.25, -0.125]))
    looks = network(image, words(["red"])[None])
    row, column = divmod(cell, width)
    expected = [(column + 0.75) / width * 2 - 1, (row + 0.375) / height * 2 - 1]
    torch.testing.assert_close(looks.coordinates[0, 0, 2], torch.tensor(expected), **CLOSE)
    torch.testing.assert_close(looks.features[0, 0, 2], cells[cell], **CLOSE)
    assert int(cell_of(looks.coordinates[0, 0, 2], height, width)) == cell
