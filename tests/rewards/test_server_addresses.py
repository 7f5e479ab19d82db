"""No address in a spec may carry a user or a password: the manifest would record it."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from aegpo.config.loading import load_experiment_file
from aegpo.core.sections import DatasetPrompts, PromptsSpec
from aegpo.errors import SpecError
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.rewards.palette import PaletteReward
from aegpo.rewards.remote import RemoteReward
from aegpo.rewards.servers import ServerRewardSpec, asked
from aegpo.rewards.vlm import VlmJudgeReward, VlmPreferenceReward

SECRET = "hunter2"
WITH_A_USER = [
    f"http://:{SECRET}@host:8000",
    f"http://user:{SECRET}@host",
    f"https://{SECRET}@host/v1",
    f"https://@{SECRET}",
    f"http://user%3A{SECRET}%40host",
    f"http://user%253A{SECRET}%2540host",
    f"http://host\\@{SECRET}",
    f"http://host/a:{SECRET}@other",
    f"http://host?a:{SECRET}@other",
    f"http://host#a:{SECRET}@other",
    f"http:user:{SECRET}@host",
    f"http:///user:{SECRET}@host",
    f"http://us\ner:{SECRET}@host",
    f"http://user:{SECRET}\uff20host",
    f"//user:{SECRET}@host",
]
NO_SERVER = [
    "host:8000",
    "ftp://host",
    "http://",
    "http://:8000",
    "http://host:eight",
    "http://host:0",
    "http://[::1",
    "http://ho st",
    "http://host?",
    "http://host/?a=b",
    "http://host#",
    "http://host\\path",
]


def remote(url):
    return RemoteReward(url=url)


def judge(url):
    return VlmJudgeReward(url=url, model="m")


def preference(url):
    return VlmPreferenceReward(url=url, model="m")


def own_words(error: ValidationError) -> str:
    """What the file's reader is told; pydantic's own text would repeat the value."""
    return "".join(str(each["ctx"]["error"]) for each in error.errors())


@pytest.mark.parametrize("url", WITH_A_USER)
@pytest.mark.parametrize("spec", [remote, judge, preference])
def test_an_address_with_a_user_is_refused_with_the_way_out_and_without_the_password(spec, url):
    with pytest.raises(ValidationError) as caught:
        spec(url)
    words = own_words(caught.value)
    assert "'token_env'" in words
    assert SECRET not in words


@pytest.mark.parametrize("url", NO_SERVER)
def test_what_is_no_address_of_a_server_is_refused_with_an_example(url):
    with pytest.raises(ValidationError, match=r"is no address of a server, such as 'http://127\.0\.0\.1:8000'"):
        remote(url)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8000", "https://host", "http://[::1]:80/v1", "https://h.example/a%20b/v1", "HTTP://Host"]
)
def test_plain_addresses_are_taken_as_they_are(url):
    assert remote(url).url == judge(url + "/").url == url


def test_every_reward_with_an_address_checks_it():
    """A new field of that kind belongs into `ServerRewardSpec`, whose check it then has."""
    specs = [entry.spec for registry in load_registries(plugin_manager()) for entry in registry]
    with_address = {spec for spec in specs if any("url" in name or "address" in name for name in spec.model_fields)}
    assert with_address == {spec for spec in specs if issubclass(spec, ServerRewardSpec)}
    assert {RemoteReward, VlmJudgeReward, VlmPreferenceReward} <= with_address


@pytest.mark.parametrize("field", ["dataset", "file"])
@pytest.mark.parametrize(
    "place",
    [
        f"https://user:{SECRET}@host/x.json",
        f"https://:{SECRET}@host/x.json",
        f"https://{SECRET}%40host/x.json",
        f"zip://x.json::https://user:{SECRET}@host/x.zip",
    ],
)
def test_the_address_of_a_dataset_names_no_user(field, place):
    with pytest.raises(ValidationError) as caught:
        DatasetPrompts(**{"dataset": "json", field: place})
    assert "download the file and give its path" in own_words(caught.value)
    assert SECRET not in own_words(caught.value)


def test_places_of_datasets_without_a_user_are_taken():
    for place in ("https://host/x.json", "hf://datasets/org/name@main/x.json", "a@b.json"):
        assert PromptsSpec(train=DatasetPrompts(dataset="json", file=place)).train.file == place


def test_whom_rewards_send_what_with_whose_token_is_said():
    told = asked(
        [
            PaletteReward(),
            RemoteReward(name="far", url="https://example.org/score/", token_env="FAR"),
            RemoteReward(url="http://127.0.0.1:8000"),
        ]
    )
    assert list(told) == [
        "reward 'far' sends images and prompts to https://example.org/score with the token in FAR",
        "reward 'remote' sends images and prompts to http://127.0.0.1:8000 with no token",
    ]


def test_a_line_of_a_file_that_has_a_password_is_not_shown(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(f"name: x\nmodel: shapes\nrewards: [{{kind: remote, url: 'http://user:{SECRET}@host'}}]\n")
    with pytest.raises(SpecError, match=r"x\.yaml:3:\d+: rewards\.0\.url: (?s:.*)the line is not shown") as error:
        load_experiment_file(path, load_registries(plugin_manager()))
    assert SECRET not in str(error.value)
