"""Networks built without values, which processes read their parts of: what they end up with is what is loaded whole."""

from __future__ import annotations

import copy
import json

import diffusers
import pytest
import torch
from pipelines import write_flux, write_sd, write_sd3
from safetensors.torch import load_file, save_file

from aegpo.core.sections import PolicySpec
from aegpo.errors import AegpoError
from aegpo.models.adapters import add_adapters
from aegpo.models.flux import FluxSpec
from aegpo.models.pipeline.loading import load_component
from aegpo.models.pipeline.unread import UnreadNetwork, has_files
from aegpo.models.sd import SdSpec
from aegpo.models.sd3 import Sd3Spec
from aegpo.models.unread import given_room, is_unread

KINDS = {"sd": (SdSpec, write_sd), "sd3": (Sd3Spec, write_sd3), "flux": (FluxSpec, write_flux)}
FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module", params=KINDS)
def pipeline(request, tmp_path_factory):
    spec, write = KINDS[request.param]
    return spec, write(tmp_path_factory.mktemp(request.param) / "pipeline")


def unread(spec, folder):
    return UnreadNetwork(spec, folder, getattr(diffusers, spec.network_class))


def loaded(spec, folder):
    return load_component(spec, folder, spec.network, getattr(diffusers, spec.network_class), spec.dtype)


def assert_alike(found, expected):
    ours, theirs = ({**dict(each.named_parameters()), **dict(each.named_buffers())} for each in (found, expected))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_read_is_what_is_loaded(pipeline, dtype):
    kind, folder = pipeline
    spec = kind(path=str(folder), dtype=dtype)
    assert has_files(spec, folder)
    empty = unread(spec, folder)
    assert is_unread(empty.network)
    base = copy.deepcopy(empty.network)
    for network in (empty.network, base):
        given_room(network, torch.device("cpu"))
        empty.read_into(network)
        assert not is_unread(network)
        assert_alike(network, loaded(spec, folder))


def test_adapters_begin_as_they_do_beside_weights_that_are_there(pipeline):
    kind, folder = pipeline
    spec = kind(path=str(folder), dtype="bfloat16")
    policy, empty, whole = PolicySpec(train="lora", rank=2), unread(spec, folder), loaded(spec, folder)
    for network in (whole, empty.network):
        torch.manual_seed(3)
        add_adapters(network, policy, spec.adapter_targets)
    given_room(empty.network, torch.device("cpu"))
    empty.read_into(empty.network)
    assert_alike(empty.network, whole)
    trained = [weight for weight in empty.network.parameters() if weight.requires_grad]
    assert trained
    assert any(weight.any() for weight in trained)


def test_several_files_are_read_by_their_index(tmp_path):
    folder = write_flux(tmp_path / "pipeline")
    spec = FluxSpec(path=str(folder), dtype="float32")
    expected, network = loaded(spec, folder), folder / spec.network
    tensors = load_file(network / FILE)
    halves = [dict(list(tensors.items())[place::2]) for place in range(2)]
    names = {}
    for number, half in enumerate(halves):
        save_file(half, network / f"part-{number}.safetensors", metadata={"format": "pt"})
        names |= dict.fromkeys(half, f"part-{number}.safetensors")
    (network / FILE).unlink()
    (network / f"{FILE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    empty = unread(spec, folder)
    given_room(empty.network, torch.device("cpu"))
    empty.read_into(empty.network)
    assert_alike(empty.network, expected)


def test_weights_that_are_not_those_of_the_config_are_refused_as_they_are_when_loaded(tmp_path):
    folder = write_sd3(tmp_path / "pipeline")
    spec = Sd3Spec(path=str(folder))
    file = folder / spec.network / FILE
    tensors = load_file(file)
    first = min(tensors)
    save_file({name: value for name, value in tensors.items() if name != first}, file, metadata={"format": "pt"})
    with pytest.raises(AegpoError, match="lacks weights the config asks for") as error:
        unread(spec, folder)
    with pytest.raises(AegpoError) as other:
        loaded(spec, folder)
    assert error.value.message == other.value.message


def test_a_network_that_is_in_no_safetensors_is_loaded_whole(tmp_path):
    folder = write_sd3(tmp_path / "pipeline")
    spec = Sd3Spec(path=str(folder))
    (folder / spec.network / FILE).unlink()
    assert not has_files(spec, folder)
