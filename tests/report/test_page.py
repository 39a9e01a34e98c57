import base64
import html.parser
import io
import re

import pytest
from PIL import Image

from finecap_ray.errors import DataError
from finecap_ray.report.page import ReportBag, ReportImage, ReportRun, System, write_report
from finecap_ray.report.settings_diff import Change, SettingsDiff

GROUP = {
    "bags": 2,
    "recall_at_1": {"mle": 0.25, "rl": 0.5, "human": 0.75},
    "interval": {"mle": [0.1, 0.4], "rl": [0.3, 0.7], "human": [0.6, 0.9], "gain": [-0.05, 0.45]},
    "recall_at_1_by_reward_scorer": {"mle": 0.3, "rl": 0.9, "human": 0.7},
}
CAPTION_METRICS = {
    "CIDEr": 1.05,
    "Bleu_1": 0.5,
    "Bleu_4": 0.125,
    "ROUGE_L": 0.4,
    "mean_length": 4.25,
    "vocabulary": 321.0,
    "distinct_1": 0.2,
    "distinct_2": 0.4,
    "repeated_words": 0.01,
    "trailing_space": 0.0,
    "full_stop": 1.0,
}
SUMMARY = {
    "bag_size": 2,
    "groups": {"whole": GROUP, "seen": GROUP},
    "caption_metrics": {"mle": CAPTION_METRICS, "rl": CAPTION_METRICS | {"CIDEr": 0.95}},
    "captions_per_s": 123.4,
    "seconds": {"mle": 90.0, "rl": 400.0},
}
METRICS = [
    {"step": step, "reward": -1 / step, "bag_size": 2 if step < 5 else 3, "seconds/sampling": 0.5}
    for step in range(1, 9)
]


def picture(colour: str, kind: str = "WEBP") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, kind)
    return file.getvalue()


def report_image(
    image_id: str, before: float, after: float, image: bytes | None = None, **captions: str
) -> ReportImage:
    texts = {"mle": "a square", "rl": f"a {image_id} square", **captions}
    return ReportImage(
        image_id=image_id,
        image=image or picture(image_id),
        captions=texts,
        rank={"mle": before, "rl": after, "human": 1.0},
        competitor={"mle": None if before == 1 else "blue", "rl": None if after == 1 else "red", "human": None},
    )


BAGS = [
    ReportBag("seen-0", 0.9, "seen", (report_image("red", 2, 1), report_image("blue", 1, 1))),
    ReportBag("seen-1", 0.8, "seen", (report_image("green", 1, 1.5), report_image("cyan", 2, 2))),
]


class Page(html.parser.HTMLParser):
    """Elements, their attributes and the text of a page; every element must be closed."""

    VOID = ("meta", "img", "br", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.text += " " if tag in ("td", "th") else ""

    def handle_data(self, data):
        self.text += data


SYSTEMS = [System("mle", "before"), System("rl", "after"), System("human", "human")]
DIFF = SettingsDiff("preset squares", (Change("rl.temperature", "0.5", "1.0"),))


def report_run(**change) -> ReportRun:
    arguments = {"name": "squares", "summary": SUMMARY, "settings_yaml": "seed: 0\n", "diff": DIFF, "metrics": METRICS}
    return ReportRun(**arguments | change)


def written(tmp_path, bags=BAGS, title="Squares", runs=None, systems=SYSTEMS, before="mle", after="rl", **run) -> str:
    path = tmp_path / "report.html"
    write_report(
        path, title=title, runs=runs or [report_run(**run)], systems=systems, before=before, after=after, bags=bags
    )
    return path.read_text(encoding="utf-8")


def test_the_headline_has_the_gain_and_its_interval(tmp_path):
    text = " ".join(Page(written(tmp_path)).text.split())
    assert "25.0 % → 50.0 %" in text
    assert "+25.0 points" in text
    assert "95 % interval −5.0 to +45.0" in text
    assert "chance is 50.0 %" in text
    assert "75.0 %by human captions, vague ones too" in text
    assert "30.0 % → 90.0 %human 70.0 %" in text  # the reward scorer's
    assert "CIDEr-D 105.0 95.0 −10.0" in text
    assert "1 settings differ from preset squares" in text and "rl.temperature 0.5 1.0" in text
    assert "seed: 0" in text
    assert "A judge decides that had no part in the reward." in text


def test_a_judge_that_gave_the_rewards_is_told_of(tmp_path):
    fooled = SUMMARY | {"warnings": ["the judge is the reward scorer"]}
    text = " ".join(Page(written(tmp_path, summary=fooled)).text.split())
    assert "Warning: the judge is the reward scorer" in text and "had no part in the reward" not in text


def test_every_image_is_in_the_page_and_nothing_is_loaded(tmp_path):
    source = written(tmp_path)
    page = Page(source)
    images = [attributes["src"] for tag, attributes in page.elements if tag == "img"]
    scripts = source[source.index("<script>") :]
    expected = [picture(colour) for colour in ("red", "blue", "green", "cyan")]
    assert [base64.b64decode(image.removeprefix("data:image/webp;base64,")) for image in images] == expected
    assert not re.search(r"https?:|//[a-z]|@import|url\(", source.replace("data:image/webp;base64,", ""))
    assert not {"link", "iframe"} & {tag for tag, _ in page.elements}
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(|eval\(|innerHTML", scripts)
    assert [attributes for tag, attributes in page.elements if tag == "script"] == [{}]


@pytest.mark.parametrize(("kind", "mime"), [("JPEG", "image/jpeg"), ("PNG", "image/png"), ("GIF", "image/gif")])
def test_the_kind_of_an_image_is_read_from_its_bytes(tmp_path, kind, mime):
    image = report_image("red", 1, 1, image=picture("red", kind))
    assert f'src="data:{mime};base64,' in written(tmp_path, bags=[ReportBag("b", 1.0, "seen", (image,))])


def test_marks_are_words_and_signs(tmp_path):
    text = " ".join(Page(written(tmp_path)).text.split())
    for mark in ("▲ won: found after, not before (1)", "✓ kept: found before and after (1)"):
        assert mark in text
    for mark in ("▼ regressed: found before, not after (1)", "✕ lost: found neither before nor after (1)"):
        assert mark in text
    assert "1 → 2 of 2 found" in text and "1 → 0 of 2 found" in text


def test_a_shared_first_place_is_not_found(tmp_path):
    text = " ".join(Page(written(tmp_path)).text.split())
    # green is expected at rank 1.5 and its competitor, red, is in another bag: named by its id
    assert "after: rank 1.5 of 2 (tie), found red a green square" in text
    # red lost to blue, the second image of its own bag
    assert "before: rank 2 of 2, found image 2 a square" in text


def test_text_of_captions_is_text(tmp_path):
    caption = "<script>alert('x')</script> & \"quotes\" <b>"
    bag = ReportBag("<bag>", 0.5, "seen", (report_image("red", 1, 1, rl=caption, mle="", human="a red square"),))
    source = written(tmp_path, bags=[bag], title="<i>title</i>", settings_yaml="name: <run>")
    page = Page(source)
    assert caption in page.text and "<bag>" in page.text and "<i>title</i>" in page.text and "<run>" in page.text
    assert [tag for tag, _ in page.elements].count("script") == 1  # the page's own
    assert "(no text)" in page.text and "human: rank 1 of 1" in page.text


def test_a_run_without_steps_or_bags_has_a_report(tmp_path):
    text = Page(written(tmp_path, metrics=[], bags=[])).text
    assert "No learning curve" in text
    assert "Bags of look-alikes" not in text


def test_what_browsers_do_not_show_is_made_webp_and_what_is_no_image_refused(tmp_path):
    def shown(image: bytes) -> str:
        return written(tmp_path, bags=[ReportBag("b", 1.0, "seen", (report_image("red", 1, 1, image=image),))])

    assert "data:image/webp;base64," in shown(picture("red", "BMP"))
    with pytest.raises(DataError, match="image red: not a decodable image"):
        shown(b"no image")


def test_several_runs_side_by_side(tmp_path):
    systems = [System("0/mle", "a, before"), System("0/rl", "a, after"), System("1/rl", "b, after")]
    image = ReportImage(
        image_id="red",
        image=picture("red"),
        captions={"0/mle": "a square", "0/rl": "a red square", "1/rl": "red"},
        rank={"0/mle": 2.0, "0/rl": 1.0},  # b wasn't judged in this bag
        competitor={"0/mle": "blue", "0/rl": None},
    )
    bag = ReportBag("bag", 0.5, "seen", (image,))
    runs = [report_run(name="a"), report_run(name="b", metrics=METRICS[:4])]
    source = written(tmp_path, [bag], runs=runs, systems=systems, before="0/mle", after="0/rl")
    text = " ".join(Page(source).text.split())
    assert "Metric a, before a, after b, before b, after" in text
    assert "b, after: not judged in this bag red" in text
    assert 'data-found="01-"' in source
    assert "a: 1 settings differ" in text and "b: 1 settings differ" in text
    assert source.count("run-0") > source.count('class="raw') == 0  # one smooth line per run and stage


def test_large_images_are_made_small(tmp_path):
    noise = Image.effect_noise((600, 400), 90).convert("RGB")
    file = io.BytesIO()
    noise.save(file, "JPEG")
    image = report_image("red", 1, 1, image=file.getvalue())
    source = written(tmp_path, [ReportBag("b", 1.0, "seen", (image,))])
    (encoded,) = re.findall(r'src="data:image/webp;base64,([^"]+)"', source)
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as small:
        assert small.size == (192, 128)
