"""Local models of a run: found from elsewhere by absolute paths, and told apart by what they hold."""

from pathlib import Path

from finecap_ray.config import load_settings
from finecap_ray.pipeline import _captioner_inputs, _with_absolute_models


def test_local_models_are_named_by_absolute_paths_and_others_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("gpt", "scratch"):
        Path(name).mkdir()
    Path("tower.safetensors").touch()
    local = _with_absolute_models(
        load_settings("demo", ["captioner.decoder=gpt", "captioner.spec=gpt", "tower.weights=tower.safetensors"])
    )
    assert local.captioner.decoder == local.captioner.spec == str(tmp_path.resolve() / "gpt")
    assert local.tower.weights == str(tmp_path.resolve() / "tower.safetensors")
    named = load_settings("demo", ["captioner.decoder=scratch"])
    assert _with_absolute_models(named) == named


def test_a_decoder_with_other_weights_is_another(tmp_path):
    """Digests of content are kept for a process: the second decoder lies elsewhere."""
    inputs = []
    for number in range(2):
        folder = tmp_path / str(number) / "gpt"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(bytes([number]))
        captioner = load_settings("demo", [f"captioner.decoder={folder}"]).captioner
        inputs.append(_captioner_inputs(captioner)["decoder"]["content"])
    assert inputs[0] != inputs[1]
