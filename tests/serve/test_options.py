"""Environment variables of the server; empty ones count as unset."""

import pytest

from luthier.core.errors import InvalidInput
from luthier.serve.options import ServerOptions, from_environment


def test_without_variables_the_defaults_hold():
    found = from_environment({"HOME": "/root"})
    assert found == ServerOptions()
    assert (found.host, found.port, found.max_concurrent, found.max_queue) == ("0.0.0.0", 8000, 8, 64)


def test_empty_variables_are_unset():
    empty = ("API_HOST", "API_PORT", "API_KEY", "API_MODEL_NAME", "API_VERBOSE", "MAX_CONCURRENT", "API_CORS_ORIGINS")
    assert from_environment(dict.fromkeys(empty, " ")) == ServerOptions()


def test_every_variable_has_its_effect():
    found = from_environment(
        {
            "API_HOST": "::1",
            "API_PORT": "0",
            "API_KEY": "a, b,",
            "API_MODEL_NAME": "mine",
            "API_VERBOSE": "1",
            "FASTAPI_ROOT_PATH": "/proxy",
            "MAX_CONCURRENT": "2",
            "API_MAX_QUEUE": "0",
            "API_CORS_ORIGINS": "http://a, http://b",
        }
    )
    assert found == ServerOptions(
        host="::1",
        port=0,
        keys=("a", "b"),
        model_name="mine",
        is_verbose=True,
        root_path="/proxy",
        max_concurrent=2,
        max_queue=0,
        cors_origins=("http://a", "http://b"),
    )
    assert found.shown_host == "[::1]"


@pytest.mark.parametrize(
    ("name", "value"), [("API_PORT", "x"), ("API_PORT", "70000"), ("MAX_CONCURRENT", "0"), ("API_MAX_QUEUE", "-1")]
)
def test_a_number_that_is_none_is_an_error(name, value):
    with pytest.raises(InvalidInput, match=name):
        from_environment({name: value})


def test_web_pages_may_call_unless_the_server_is_for_this_machine():
    assert ServerOptions(host="127.0.0.1").allowed_origins == ServerOptions(host="localhost").allowed_origins == ()
    assert ServerOptions(host="0.0.0.0").allowed_origins == ("*",)
    assert ServerOptions(host="127.0.0.1", cors_origins=("http://a",)).allowed_origins == ("http://a",)


def test_images_that_a_request_may_name(tmp_path):
    assert from_environment({}).media_folder is None and not from_environment({}).allows_urls
    given = {"SAFE_MEDIA_PATH": str(tmp_path), "API_ALLOW_URLS": "1"}
    assert from_environment(given).media_folder == str(tmp_path) and from_environment(given).allows_urls
    assert from_environment(given | {"ALLOW_LOCAL_FILES": "0"}).media_folder is None
    with pytest.raises(InvalidInput, match=r"^SAFE_MEDIA_PATH: .*/absent is not a folder"):
        from_environment({"SAFE_MEDIA_PATH": f"{tmp_path}/absent"})
