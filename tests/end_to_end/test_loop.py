"""The main job from examples to a summary, every engine real and small; then once more, and then some steps further."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from finecap_ray.captioners import load_captioner
from finecap_ray.config import Settings
from finecap_ray.errors import DataError, MismatchError
from finecap_ray.pipeline import Pipeline
from finecap_ray.progress import Narrator
from finecap_ray.report.assemble import rebuild_report
from finecap_ray.sources import read_examples
from finecap_ray.stages import Stages
from finecap_ray.training.loop import train_rl
from finecap_ray.training.metrics_file import read_metrics

pytestmark = pytest.mark.timeout(900)  # the fixture is the whole job: 2 minutes on 2 quiet cores, more on busy ones

PER_SPLIT = {"train": 60, "dev_seen": 10, "dev_unseen": 10, "test_seen": 20, "test_unseen": 20}
STAGES = [
    "features",
    "embeddings/images",
    "scorer",
    "judge",
    "mle",
    "bags/train",
    "bags/test_seen",
    "bags/test_unseen",
    "rl",
    "evaluation",
]
STEPS = 4


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loop")
    every = read_examples("fluent")
    splits = [every.filter(pa.compute.equal(every["split"], name)).slice(0, n) for name, n in PER_SPLIT.items()]
    pq.write_table(pa.concat_tables(splits), folder / "examples.parquet")
    small = {"epochs": 2, "batch_size": 32, "embed_dim": 32}
    return Settings.model_validate(
        {
            "run_dir": str(folder / "run"),
            "data": {"examples": str(folder / "examples.parquet")},
            "tower": {"model": "tf_efficientnet_lite0", "image_size": 64},
            "scorer": small | {"text": "scratch"},
            "judge": small | {"image_groups": 1},  # looks at the images, the scorer at features
            "captioner": {
                "width": 32,
                "layers": 1,
                "heads": 1,
                "mapper": "mlp",
                "mapper_width": 32,
                "vocabulary": 400,
                "max_tokens": 8,
            },
            "mle": {"epochs": 2},
            "bags": {"sizes": [2, 3]},
            "rl": {
                "curriculum": [{"bag_size": 2, "epochs": 1}, {"bag_size": 3, "epochs": 1}],
                "images_per_step": 12,
                "captions_per_image": 2,
                "max_steps": STEPS,
                "advantage": "running_mean",
                "average_decay": 0,
                "drift_bound": 1e-5,
            },
            "evaluation": {"bag_size": 3, "more_bag_sizes": [2], "bootstrap_samples": 100},
            "resources": {"sampler_max_sequences": 64, "threads": 1},
        }
    )


def pipeline(settings, kept=()) -> tuple[Pipeline, Stages]:
    narrator = Narrator(Console(quiet=True))
    stages = Stages(settings.run_dir, narrator.started, narrator.ended, kept)
    return Pipeline(settings, stages, narrator), stages


@pytest.fixture(scope="module")
def finished(ray_session, settings):
    """The pipeline of a run that has ended, and its stages."""
    own, stages = pipeline(settings)
    own.evaluation  # noqa: B018 - a stage runs when it is first asked for
    return own, stages


def rl_steps(run):
    """Rows of the steps; the last row of a training says how long it took."""
    return [row for row in read_metrics(run.rl.folder / "metrics.jsonl") if "reward" in row]


def test_the_whole_job_ends_with_a_summary(finished):
    run, stages = finished
    assert sorted(result.name for result in stages.results) == sorted(STAGES)
    assert not any(result.cached for result in stages.results)
    summary = run.summary()
    manifests = [
        json.loads((run.bags(split).folder / "manifest.json").read_text()) for split in ("test_seen", "test_unseen")
    ]
    assert summary["bags"] == sum(manifest["sizes"]["3"]["bags"] for manifest in manifests) > 0
    for system in ("mle", "rl", "human"):
        assert 0 <= summary["recall_at_1"][system] <= 1
    assert {"CIDEr", "Bleu_4", "repeated_words"} <= summary["caption_metrics"]["rl"].keys()
    assert summary["bag_sizes"].keys() == {"3", "2"} and summary["bag_sizes"]["3"] == summary["groups"]
    assert summary["made_with"]["scorers"].keys() == {"judge", "reward scorer"}


def test_the_report_of_the_run_and_of_two_of_them(finished, tmp_path):
    run, _ = finished
    run.write_report(run.summary())
    page = (run.run_dir / "report.html").read_text()
    assert "by human captions, vague ones too" in page and page.count('class="bag"') == sum(
        own["whole"]["bags"] for own in run.summary()["bag_sizes"].values()
    )
    both = rebuild_report([run.run_dir, run.run_dir], tmp_path / "both.html").read_text()
    assert "run (run) 1, after" in both and "run (run) 2, after" in both


def test_every_step_says_its_reward_and_a_drift_of_rounding(finished):
    steps = rl_steps(finished[0])
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert {row["captions"] for row in steps} == {12 * 2}
    assert max(row["drift/max"] for row in steps) <= 1e-5
    assert all(row["grad_norm"] > 0 for row in steps)
    assert any((finished[0].rl.folder / "tensorboard").iterdir())


def test_a_second_run_finds_every_stage_done(finished, settings):
    patient = settings.data.model_copy(update={"max_bad_fraction": 0.5})  # only says when a job stops
    again, stages = pipeline(settings.model_copy(update={"data": patient}))
    assert again.evaluation.cached
    assert all(result.cached for result in stages.results)
    assert again.summary() == finished[0].summary()
    assert not (again.mle.folder / "checkpoints").exists()


def test_changed_settings_of_a_finished_training_are_refused_and_nothing_is_touched(finished, settings):
    run, _ = finished
    files = {path: path.stat().st_mtime_ns for path in run.run_dir.rglob("*") if "logs" not in path.parts}
    changed = settings.model_copy(update={"bags": settings.bags.model_copy(update={"near_duplicate": 0.5})})
    with pytest.raises(
        DataError, match=r"rl was made with other inputs \(bags.near_duplicate was \S+, is 0\.5\): go back"
    ):
        pipeline(changed, kept=("mle", "rl"))
    assert {path: path.stat().st_mtime_ns for path in run.run_dir.rglob("*") if "logs" not in path.parts} == files
    assert pipeline(settings, kept=("mle", "rl"))[0].rl.cached


def train_on(run, settings, scorer):
    references = [row["captions"] for row in run.rows("train")]
    train_rl(settings, str(run.mle.folder), str(run.bags("train").folder), scorer, references, str(run.rl.folder))


def test_the_reward_refuses_bags_of_another_scorer(finished, settings):
    """What a worker refuses crosses Ray Train as itself."""
    run, _ = finished
    made_with = json.loads((run.bags("train").folder / "manifest.json").read_text())["scorer"]["digest"]
    with pytest.raises(MismatchError, match=rf"\({made_with}\), the reward's scorer is (?!{made_with})"):
        train_on(run, settings, run.judge.spec)


def test_a_run_with_more_steps_goes_on_where_it_ended_with_two_workers_too(finished, settings):
    run, _ = finished
    before = rl_steps(run)
    longer = settings.rl.model_copy(update={"max_steps": STEPS + 2, "num_workers": 2, "start_share": 0.25})
    train_on(run, settings.model_copy(update={"rl": longer}), run.scorer.spec)
    after = rl_steps(run)
    assert after[:STEPS] == before
    assert [row["step"] for row in after[STEPS:]] == [STEPS + 1, STEPS + 2]  # one row each, of the first worker
    assert {row["captions"] for row in after[STEPS:]} == {12 * 2}  # those of both
    assert max(row["drift/max"] for row in after[STEPS:]) <= 1e-5
    # The last checkpoint has the weights that trained, the result a quarter of those that they started from.
    folders = (run.mle.folder, run.rl.folder / "checkpoints" / f"checkpoint-{STEPS + 2}", run.rl.folder / "captioner")
    start, last, result = (load_captioner(folder)[0].state_dict() for folder in folders)
    moved = [name for name in start if not torch.equal(start[name], last[name])]
    assert moved
    for name, tensor in result.items():
        torch.testing.assert_close(tensor, 0.25 * start[name] + 0.75 * last[name])
