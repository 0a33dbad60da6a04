"""What `luthier sweep` refuses, from outside. Whole sweeps are in `tests/workflow/test_sweep.py`."""

from luthier.cli import main
from tests.working_folder import write


def test_all_faults_come_before_the_first_run(folder, llama_folder, capsys):
    run_file = write(folder, model_name_or_path=str(llama_folder), finetuning_type="lora")
    assert main(["sweep", run_file, "lora_rank=8,x", "cutoff_len=0,64"]) == 2
    told = capsys.readouterr().err
    assert "lora_rank: 'x': must be a whole number" in told and "cutoff_len: " in told and "Traceback" not in told
    assert not (folder / "o").exists()


def test_what_is_no_sweep_says_so(folder, capsys):
    assert main(["sweep", write(folder)]) == 2
    assert "sweep: no key has several values -> write them with commas" in capsys.readouterr().err
    assert main(["sweep"]) == 2


def test_it_starts_its_runs_itself(folder, capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(["sweep", write(folder), "lora_rank=8,16"]) == 2
    assert "start it without torchrun" in capsys.readouterr().err
