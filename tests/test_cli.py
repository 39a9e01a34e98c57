"""The command line: what it prints, what it refuses before Ray starts, and how fast help is there."""

import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finecap_ray.cli import main
from finecap_ray.stages import STAGE_FILE


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    code = 0
    try:
        main(list(arguments))
    except SystemExit as stop:
        code = stop.code or 0
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize(
    "arguments",
    [
        *(["demo"], ["doctor"], ["import"], ["scorer", "train"], ["scorer", "evaluate"], ["bags", "build"]),
        *(["train", "mle"], ["train", "rl"], ["evaluate"], ["caption"], ["report"], ["export"], ["serve"]),
    ],
)
def test_every_command_has_help(capsys, arguments):
    code, out, _ = run(capsys, *arguments, "--help")
    assert code == 0 and " ".join(["finecap", *arguments]).removeprefix("finecap") in " ".join(out.split())


def test_help_loads_no_engine():
    program = (
        "import sys\nfrom finecap_ray.cli import main\n"
        "try: main(['demo', '--help'])\nexcept SystemExit: pass\n"
        "print('loaded:', sorted({'torch', 'ray', 'vllm', 'numpy', 'pyarrow'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("loaded: []\n")


def test_an_unknown_preset_names_those_there_are(capsys):
    code, _, err = run(capsys, "demo", "--config", "demmo")
    assert code == 2 and "error: no preset 'demmo': did you mean 'demo'?" in err


def test_an_unknown_key_names_the_nearest(capsys):
    code, _, err = run(capsys, "train", "rl", "rl.lerning_rate=1e-4", "--dry-run")
    assert code == 2 and "unknown setting 'rl.lerning_rate': the nearest known one is 'rl.learning_rate'" in err
    assert "Traceback" not in err


def test_a_dry_run_prints_settings_and_arithmetic_and_makes_nothing(capsys, tmp_path):
    run_dir = tmp_path / "run"
    curriculum = "rl.curriculum=[{bag_size: 5, epochs: 2}]"
    sizes = ["rl.images_per_step=60", "rl.captions_per_image=8", "rl.micro_batch=240"]
    code, out, _ = run(capsys, "train", "rl", "--dry-run", f"run_dir={run_dir}", curriculum, *sizes)
    assert code == 0 and f"run_dir: {run_dir}" in out
    assert "12 bags x 5 images x 8 captions = 480 sequences per step; 1 worker: 12 bags, 480 sequences" in out
    assert "2 micro-batches; 2 epochs, steps known once the bags are mined" in out
    assert not run_dir.exists()


def test_a_dry_run_counts_the_steps_of_mined_bags(capsys, tmp_path):
    folder = tmp_path / "bags" / "train"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"sizes": {"5": {"bags": 30}}}))
    changes = [f"run_dir={tmp_path}", "rl.images_per_step=60", "rl.curriculum=[{bag_size: 5, epochs: 2}]"]
    _, out, _ = run(capsys, "train", "rl", "--dry-run", *changes)
    assert "3 steps each" in out and "together 6 steps" in out  # 12 + 12 + 6 bags, twice


def test_impossible_arithmetic_is_refused_with_the_numbers(capsys, tmp_path):
    changes = [f"run_dir={tmp_path / 'run'}", "rl.images_per_step=4"]
    for more in ([], ["--dry-run"]):
        code, _, err = run(capsys, "train", "rl", *changes, *more)
        assert code == 2 and "4 images per step // 5 images per bag = 0 bags per step" in err
    assert run(capsys, "demo", *changes)[0] == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", ["mle", "rl"])
def test_a_run_folder_that_exists_is_refused_without_resume(capsys, tmp_path, stage):
    (tmp_path / stage).mkdir()
    (tmp_path / stage / STAGE_FILE).write_text("{}")
    code, _, err = run(capsys, "train", stage, f"run_dir={tmp_path}")
    assert code == 2 and f"exists and holds {stage}: use --resume to go on" in " ".join(err.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == [stage]


def test_a_report_of_no_run_says_what_is_missing(capsys, tmp_path):
    code, _, err = run(capsys, "report", str(tmp_path))
    assert code == 2 and "has no config.yaml and no summary.json" in err


def test_an_evaluation_of_what_does_not_fit_is_refused_before_ray_starts(capsys, tmp_path):
    code, _, err = run(capsys, "evaluate", "--captions", str(tmp_path / "absent.json"))
    assert code == 2 and "absent.json can't be read" in err
    file = tmp_path / "captions.json"
    file.write_text('{"no-such-emoji": "a cat"}')
    code, _, err = run(capsys, "evaluate", "--captions", str(file))
    assert code == 2 and "no image of fluent" in err
    code, _, err = run(capsys, "evaluate", "--captions", str(file), "evaluation.decoding=beam:5")
    assert code == 2 and "captions greedily, or takes the best of N" in err
    code, _, err = run(capsys, "evaluate", "--checkpoint", str(tmp_path))
    assert code == 2 and "is not a captioner" in err
    code, _, err = run(capsys, "evaluate", "--captions", str(file), "--captions-out", str(tmp_path / "out.json"))
    assert code == 2 and "--captions-out is for the captions of a --checkpoint" in err
    code, _, err = run(capsys, "evaluate", "--captions", str(file), "--out", "/proc/results.json")
    assert code == 2 and "/proc/results.json can't be written" in err
    code, _, err = run(capsys, "evaluate", "--judge", "ViT-B-32/openai", f"run_dir={tmp_path / 'run'}")
    assert code == 2 and "--judge, --reward-scorer, --split and --against are for --captions or a --checkpoint" in err


def test_a_captions_file_is_evaluated_as_json_and_markdown(capsys, ray_session, judge_folder, tmp_path):
    from finecap_ray.sources import read_examples

    rows = [row for row in read_examples("fluent").to_pylist() if row["captions"]][:6]
    file, out = tmp_path / "captions.json", tmp_path / "results.json"
    file.write_text(json.dumps({row["image_id"]: row["captions"][0] for row in rows}))
    arguments = ["--captions", str(file), "--against", "random:3", "evaluation.java_metrics=[]", "--out", str(out)]
    code, printed, err = run(capsys, "evaluate", *arguments, "--judge", str(judge_folder), "--format", "markdown")
    assert code == 0, err
    assert "| captions | by | against |" in printed
    assert json.loads(out.read_text())["retrieval"][0]["against"] == "3 random images"
    code, printed, _ = run(capsys, "evaluate", *arguments, "--format", "json")
    assert code == 0 and json.loads(printed) == json.loads(out.read_text())


@pytest.mark.parametrize("form", ["table", "json", "markdown"])
def test_captions_against_references_need_no_images(capsys, tmp_path, form):
    file = tmp_path / "both.parquet"
    pq.write_table(pa.table({"image_id": [1, 2], "caption": ["a dog", ""], "references": [["a dog"], ["a cat"]]}), file)
    arguments = ["evaluate", "--captions", str(file), "--references", str(file), "evaluation.java_metrics=[]"]
    code, printed, err = run(capsys, *arguments, "--format", form)
    assert code == 0 and err == "" and "Bleu_1" in printed and "no images were given" in printed
    code, _, err = run(capsys, *arguments, "--against", "all")
    assert code == 2 and "--references is for caption metrics" in err


def test_a_scorer_is_measured(capsys, ray_session, judge_folder, tmp_path):
    from finecap_ray.sources import read_examples

    rows = read_examples("fluent")
    dev = rows.filter(pa.compute.equal(rows["split"], "dev_seen")).slice(0, 12)
    pq.write_table(dev, tmp_path / "examples.parquet")
    rated = [{"image_id": row["image_id"], "caption": row["captions"][0], "ratings": [4, 3]} for row in dev.to_pylist()]
    rated += [row | {"caption": "x", "ratings": [1, 1]} for row in rated]
    pq.write_table(pa.Table.from_pylist(rated), tmp_path / "ratings.parquet")
    arguments = ["--spec", str(judge_folder), "--ratings", str(tmp_path / "ratings.parquet")]
    code, out, err = run(capsys, "scorer", "evaluate", *arguments, f"data.examples={tmp_path / 'examples.parquet'}")
    assert code == 0, err
    for part in ("R@1 ", "among 12 random images", "longer than it reads", "binding", "tau-b", "of 24 rated captions"):
        assert part in out


def test_an_import_of_nothing_is_one_message(capsys, ray_session, tmp_path):
    code, _, err = run(capsys, "import", str(tmp_path / "absent"), str(tmp_path / "out"))
    assert code == 2 and "error: nothing at" in err and "Traceback" not in err


def test_an_import_says_what_it_made_and_left_out(capsys, ray_session, tmp_path):
    from finecap_ray.sources import read_examples

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for row in read_examples("fluent").slice(0, 3).to_pylist():
        (pictures / f"{row['image_id']}.webp").write_bytes(row["image"])
        (pictures / f"{row['image_id']}.txt").write_text("a caption")
    (pictures / f"{row['image_id']}.txt").write_bytes(b"caf\xe9 in Latin-1")
    (pictures / "broken.webp").write_bytes(b"no picture")
    code, out, err = run(capsys, "import", str(pictures), str(tmp_path / "out"), "data.max_bad_fraction=0.5")
    assert code == 0, err
    assert "3 examples of 4 images" in out and "(train 3)" in out and "1 left out: " in out
    assert "1 captions left out: not text" in out and "1 examples without a caption" in out
    assert read_examples(str(tmp_path / "out")).num_rows == 3


def test_the_doctor_finds_this_environment_healthy(capsys, ray_session):
    code, out, _ = run(capsys, "doctor")
    assert code in (0, 1)  # the machine under the tests may be small; the software has to be right
    for name in ("python", "torch", "transformers", "trl", "ray", "vllm", "torchvision", "ray actor", "sampler"):
        assert f"\nok     {name}" in f"\n{out}"


def test_an_interrupt_is_told_without_a_stack_trace(capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("finecap_ray.cli.load_settings", interrupted)
    code, _, err = run(capsys, "demo")
    assert code == 130 and "stopped" in err and "Traceback" not in err
