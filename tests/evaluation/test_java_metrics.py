import shutil

import pytest

from finecap_ray.errors import DataError
from finecap_ray.evaluation import java_metrics as module
from finecap_ray.evaluation.java_metrics import NotAvailable, java_metrics

CANDIDATES, REFERENCES = {"a": "A dog runs.", "b": ""}, {"a": ["a dog runs", "a cat"], "b": ["a cat"]}


def test_without_java_every_metric_says_why(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = java_metrics(CANDIDATES, REFERENCES, "coco")
    assert set(found) == {"METEOR", "SPICE"}
    assert {str(own) for own in found.values()} == {"not available: it runs in Java, and no `java` is on the PATH"}


def test_a_java_that_does_not_start_is_told(monkeypatch, tmp_path):
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho no such vm >&2\nexit 3\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert module.missing_java() == NotAvailable("`java -version` failed with code 3: no such vm")


def test_a_java_that_dies_on_the_way_is_told(monkeypatch, tmp_path):
    """pycocoevalcap would wait for its own lock for ever."""
    java = tmp_path / "java"
    java.write_text('#!/bin/sh\n[ "$1" = -version ] && exit 0\necho out of memory >&2\nexit 1\n')
    java.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    found = java_metrics(CANDIDATES, REFERENCES, "coco", ("METEOR",))["METEOR"]
    assert found == NotAvailable("METEOR's Java process stopped (out of memory)")


@pytest.mark.skipif(shutil.which("java") is None, reason="no java on the PATH")
def test_meteor_by_java():
    both = java_metrics({"a": "a dog runs", "b": ""}, REFERENCES, "coco", ("METEOR",))["METEOR"]
    assert 0 < both < 1  # one of two captions is its reference, the other is empty


@pytest.mark.skipif(shutil.which("java") is None, reason="no java on the PATH")
def test_spice_downloads_nothing():
    if all(path.is_file() for path in module._spice_parser()):
        pytest.skip("SPICE's parser is installed")
    found = java_metrics(CANDIDATES, REFERENCES, "coco", ("SPICE",))["SPICE"]
    assert isinstance(found, NotAvailable) and "stanford-corenlp-3.6.0.jar" in found.reason


def test_another_metric_is_refused():
    with pytest.raises(DataError, match="no metric ROUGE: Java ones are METEOR, SPICE"):
        java_metrics(CANDIDATES, REFERENCES, "coco", ("ROUGE",))
