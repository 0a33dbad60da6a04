"""Blocks of images as people see them: in the terminal, on the page, and in the check of a template."""

import json
from pathlib import Path

import pytest
import yaml

from luthier.cli import main
from luthier.inspection.images import between, shown_images
from luthier.inspection.terminal import sequences_of
from tests.data.media.rows import TAG, answer, row, user, world
from tests.media_models import draw
from tests.torchvision_models import FAMILIES

BLOCK = "[image 1: 56x84, 8 tokens]"


@pytest.fixture(scope="module")
def run_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("see")
    see = world(folder, FAMILIES["paddleocr_vl"])
    rows = [row(user(f"a{TAG}b"), answer("c"), images=[see.image(56, 84)]), row(user("d"), answer("e"))]
    (folder / "see.json").write_text(json.dumps(rows))
    values = {"model_name_or_path": str(folder / "model"), "dataset": "see", "dataset_dir": str(folder)}
    (folder / "run.yaml").write_text(yaml.safe_dump({**values, "output_dir": str(folder / "out")}))
    return folder / "run.yaml"


def test_a_block_is_one_word_in_the_terminal(run_file, capsys):
    assert main(["data", str(run_file)]) == 0
    out, err = capsys.readouterr()
    assert f"<|im_start|>user\na{BLOCK}b<|im_end|>\n<|im_start|>assistant\n⟦c<|im_end|>\n⟧" in out
    assert "; 1 image of 8 tokens" in err


def test_json_has_the_columns(run_file, capsys):
    assert main(["data", str(run_file), "--json"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["blocks"] == [7, 15]
    assert first["images"] == [str(run_file.parent / "56x84-0.png")]
    assert "images" not in second and "blocks" not in second


def test_a_block_is_one_word_on_the_page(run_file, tmp_path):
    assert main(["data", str(run_file), "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count(BLOCK) == 2, "the text and the tip of one token"
    assert "<th>images</th><th>image tokens</th><th>images left out</th>" in page


def test_samples_of_a_pack_have_their_own(tmp_path):
    path = str(draw(tmp_path / "a.png"))
    pack = {"input_ids": [1, 2, 3, 4, 5], "labels": [0] * 5, "weights": [], "sample_lengths": [2, 3],
            "blocks": [1, 2, 3, 4], "images": [path, path]}  # fmt: skip
    (_, first), (_, second) = sequences_of(pack)
    assert shown_images(first) == [(1, 2, "[image 1: 28x28, 1 token]")]
    assert shown_images(second) == [(1, 2, "[image 1: 28x28, 1 token]")]


def test_a_file_that_is_gone_has_no_size():
    assert shown_images({"blocks": [0, 3], "images": ["/no/a.png"]}) == [(0, 3, "[image 1: 3 tokens]")]


def test_the_tokens_around_images():
    assert list(between(0, 5, [(1, 2, "x"), (2, 4, "y")])) == [(0, 1, ""), (1, 2, "x"), (2, 4, "y"), (4, 5, "")]
    assert list(between(0, 3, [])) == [(0, 3, "")]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_template_is_checked_with_images(tmp_path, family, capsys):
    """Against the ids that the processor itself gives for text and pixels."""
    FAMILIES[family](tmp_path / family)
    status = main(["template", "check", str(tmp_path / family)])
    out, _ = capsys.readouterr()
    if family == "llava_onevision":  # the first answer is given before the second image is there
        assert status == 1 and "  images                     DIFFERS at token 11 (answer 1)" in out
    else:
        assert status == 0 and "  images                     equal (2 answers)\n" in out


def test_a_template_is_checked_with_rows_of_a_run(run_file, capsys):
    model = str(run_file.parent / "model")
    assert main(["template", "check", model, "--data", str(run_file)]) == 0
    assert "all 2 conversations are equal" in capsys.readouterr().out


def test_a_format_that_puts_images_elsewhere_differs(tmp_path, capsys):
    FAMILIES["llava"](tmp_path / "llava")
    assert main(["template", "check", str(tmp_path / "llava"), "chatml"]) == 1
    assert "  images                     DIFFERS" in capsys.readouterr().out
