"""The embedded model that ships with the package."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch

from aegpo.errors import AegpoError
from aegpo.method.samplers import FlowSde
from aegpo.models.shapes import WEIGHTS, ShapesSpec
from aegpo.models.shapes.captions import KINDS, captions, parse
from aegpo.prompts.lists import numbered
from aegpo.rewards.scene import SceneReward
from aegpo.testing import check_model
from aegpo.train.execution import Execution
from aegpo.train.rollouts import sample_deterministic

STEPS = 10


@pytest.fixture(scope="module")
def model():
    return ShapesSpec().build(torch.device("cpu"))


def paint(model, texts, seed=0):
    how = Execution(model, model.velocity, FlowSde(), model.sigmas(STEPS), 64, torch.float32)
    noise = torch.randn(len(texts), *model.latent_shape, generator=torch.Generator().manual_seed(seed))
    return sample_deterministic(how, noise, model.encode(numbered(texts)))


def test_the_weights_and_their_card_stay_under_ten_megabytes():
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 10_000_000
    assert (WEIGHTS / "MODEL_CARD.md").is_file()


def test_the_embedded_model_fulfils_the_interface():
    check_model(ShapesSpec())


@pytest.mark.parametrize("split", ["train", "evaluation"])
def test_its_prompts_are_the_captions_with_their_kinds(split):
    prompts = ShapesSpec().captions(split, 50, 3)
    assert tuple(prompt.text for prompt in prompts) == captions(split, 50, 3)
    assert [prompt.metadata for prompt in prompts] == [{"kind": parse(prompt.text).kind} for prompt in prompts]
    assert numbered(prompts) == prompts


def test_the_embedded_model_is_partly_right_on_held_out_captions(model):
    """The gate for reward training: strict accuracy between 40 and 70 % at the training step count."""
    texts = captions("evaluation", 120)
    images = paint(model, texts)
    strict = SceneReward(strict=True).score(images, numbered(texts))
    assert 0.4 <= float(strict.mean()) <= 0.7
    other = texts[1:] + texts[:1]
    right, wrong = (float(SceneReward().score(images, numbered(asked)).mean()) for asked in (texts, other))
    assert right > 0.8 > 0.3 > wrong


@pytest.mark.parametrize("kind", KINDS)
def test_the_embedded_model_half_knows_every_kind_of_caption(model, kind):
    """So that there is something to learn from a reward, and something to tell right from wrong by."""
    texts = [text for text in captions("evaluation", 320) if parse(text).kind == kind]
    strict = SceneReward(strict=True).score(paint(model, texts), numbered(texts))
    assert 0.15 <= float(strict.mean()) <= 0.85


def test_the_embedded_model_gets_a_caption_right_from_some_noises_and_wrong_from_others(model):
    texts = captions("evaluation", 24)
    reward = SceneReward(strict=True)
    tries = torch.stack([reward.score(paint(model, texts, seed), numbered(texts)) for seed in range(6)])
    mixed = (tries.mean(dim=0) > 0) & (tries.mean(dim=0) < 1)
    assert float(mixed.float().mean()) > 0.5


def test_guidance_sharpens_towards_the_caption(model):
    guided = ShapesSpec(guidance=2.0).build(torch.device("cpu"))
    latents, sigma = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0)), torch.tensor([0.8, 0.5])
    cond = model.encode(numbered(["a red circle", "two blue squares"]))
    nothing = model.encode(numbered(["", ""]))
    with torch.no_grad():
        with_caption, without = model.velocity(latents, sigma, cond), model.velocity(latents, sigma, nothing)
        assert torch.allclose(guided.velocity(latents, sigma, cond), 2 * with_caption - without, atol=1e-5)


def test_guidance_is_one_batch_but_where_attention_is_watched(monkeypatch):
    guided, rows = ShapesSpec(guidance=2.0).build(torch.device("cpu")), []
    forward = guided._forward
    monkeypatch.setattr(guided, "_forward", lambda latents, *rest: rows.append(len(latents)) or forward(latents, *rest))
    latents, sigma, cond = torch.zeros(2, 3, 24, 24), torch.tensor([0.8, 0.5]), guided.encode(numbered(["a", "b"]))
    together = guided.velocity(latents, sigma, cond)
    calls = []
    with guided.tap_attention(calls.append):
        apart = guided.velocity(latents, sigma, cond)
    assert rows == [4, 2, 2]
    assert {len(call.query) for call in calls} == {2}
    assert torch.allclose(together, apart, atol=1e-5)


def test_a_prompt_longer_than_the_model_reads_is_an_error(model):
    with pytest.raises(AegpoError, match="has more than the 12 words model 'shapes' can read"):
        model.encode(numbered(["a red circle and " * 5]))


def test_a_folder_without_weights_is_an_error(tmp_path: Path):
    with pytest.raises(AegpoError, match="no weights of model 'shapes'"):
        ShapesSpec(weights=tmp_path).build(torch.device("cpu"))


@pytest.mark.parametrize("content", [b"no tensors", pickle.dumps(Path), b""])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_cannot_be_read_are_an_error_that_advises_nothing_unsafe(content, name, tiny_weights, tmp_path):
    weights = Path(shutil.copytree(tiny_weights, tmp_path / "weights"))
    (weights / "text_encoder" / "model.safetensors").unlink()
    (weights / "text_encoder" / name).write_bytes(content)
    with pytest.raises(AegpoError, match=r"model 'shapes': '.*weights' cannot be loaded: ") as error:
        ShapesSpec(weights=weights).build(torch.device("cpu"))
    assert "weights_only" not in str(error.value)
