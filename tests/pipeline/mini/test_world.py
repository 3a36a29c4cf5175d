import itertools
import json

import av
import numpy as np
import pytest

from pipeline.mini.coded import sampled_frames
from pipeline.mini.render import RGB, picture, render
from pipeline.mini.scene import Background, Scene, Sign, Thing, sample_scene
from pipeline.mini.vocabulary import COLORS, SHAPES, SIGN_WORDS
from pipeline.mini.world import SPLIT_SIZE, SPLITS, demo_scene, frame_times, render_demo, scene_seed, write_video

PLAIN = Background("plain", (40, 40, 40), (40, 40, 40), 0)


def scene_of(*things, width=128, height=96, duration_s=4.0, sign=None):
    return Scene(width, height, duration_s, things, sign, PLAIN)


def test_the_same_seed_gives_the_same_scene_and_the_same_pixels():
    first, second = (sample_scene(np.random.default_rng(7), 112, 96, 4.0) for _ in range(2))
    assert first == second
    assert np.array_equal(render(first, [0.0, 1.5]), render(second, [0.0, 1.5]))
    assert first != sample_scene(np.random.default_rng(8), 112, 96, 4.0)


def test_seed_ranges_of_the_splits_do_not_meet():
    ranges = [(scene_seed(split, 0), scene_seed(split, SPLIT_SIZE - 1)) for split in SPLITS]
    assert all(end < start for (_, end), (start, _) in itertools.pairwise(ranges))


@pytest.mark.parametrize(("split", "index"), [("training", 0), ("train", -1), ("test", SPLIT_SIZE)])
def test_a_seed_outside_the_splits_is_refused(split, index):
    with pytest.raises(ValueError, match="expected"):
        scene_seed(split, index)


def test_things_stay_inside_the_frame_and_never_touch_each_other_or_the_sign():
    for seed in range(150):
        scene = sample_scene(np.random.default_rng(seed), 128, 96, 6.0, max_things=5, sign_words=True)
        for time_s in np.linspace(0, 6, 13):
            here = [(*thing.position(time_s), thing.radius_px) for thing in scene.things if thing.appear_s <= time_s]
            assert all(r <= x <= 128 - r and r <= y <= 96 - r for x, y, r in here)
            for i, (x, y, r) in enumerate(here):
                assert all(max(abs(x - a), abs(y - b)) >= 0.8 * (r + c) for a, b, c in here[:i])
                if scene.sign:
                    half_w, half_h = scene.sign.half_size_px
                    assert abs(x - scene.sign.x_px) >= half_w or abs(y - scene.sign.y_px) >= half_h


def test_every_scene_has_something_to_tell_and_distinct_things():
    scenes = [sample_scene(np.random.default_rng(seed), 96, 96, 4.0) for seed in range(200)]
    assert all(scene.things or scene.sign for scene in scenes)
    assert all(len({thing.name for thing in scene.things}) == len(scene.things) for scene in scenes)
    assert {len(scene.things) for scene in scenes} >= {0, 1, 2, 3}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("color", COLORS)
def test_a_thing_has_its_colour_where_it_is_and_leaves_the_rest(shape, color):
    thing = Thing(color, shape, "large", 64.0, 48.0, 16.0)
    image = picture(scene_of(thing, duration_s=0.0)).astype(int)
    covered = np.abs(image - RGB[color]).max(-1) <= 1
    assert 0.2 < covered.sum() / 32**2 < 0.9
    assert np.array_equal(image[:30], np.full((30, 128, 3), 40))
    rows, columns = np.nonzero(covered)
    assert abs(columns.mean() - 63.5) < 1
    assert rows.min() >= 31
    assert rows.max() <= 64


def test_a_moving_thing_is_where_its_speed_says():
    thing = Thing("red", "square", "small", 20.0, 48.0, 9.0, "right", 16.0, appear_s=1.0)
    frames = render(scene_of(thing), [0.0, 1.0, 2.0, 3.5]).astype(int)
    red = (frames[..., 0] > 180) & (frames[..., 1] < 80)
    assert not red[0].any()
    centres = [np.nonzero(frame)[1].mean() + 0.5 for frame in red[1:]]
    assert np.allclose(centres, [20, 36, 60], atol=0.6)


@pytest.mark.parametrize("text", ["407", "8", *SIGN_WORDS[:3]])
def test_a_sign_is_drawn_light_on_dark_and_texts_differ(text):
    image = picture(scene_of(duration_s=0.0, sign=Sign(text, 64.0, 48.0, 13.0)))
    other = picture(scene_of(duration_s=0.0, sign=Sign(text[::-1] if len(text) > 1 else "3", 64.0, 48.0, 13.0)))
    assert (image[30:66, 30:98] > 200).any()
    assert (image[40:56, 60:68] < 20).any()
    assert not np.array_equal(image, other)


def test_an_unknown_character_or_shape_is_refused():
    with pytest.raises(ValueError, match="digit or a lower-case letter"):
        picture(scene_of(duration_s=0.0, sign=Sign("A", 64.0, 48.0, 13.0)))
    with pytest.raises(ValueError, match="expected a shape"):
        picture(scene_of(Thing("red", "blob", "large", 64.0, 48.0, 16.0), duration_s=0.0))


@pytest.mark.parametrize("fps", [8, 24])
def test_an_h264_file_decodes_to_the_rendered_frames(tmp_path, fps):
    scene = sample_scene(np.random.default_rng(3), 128, 96, 2.0)
    write_video(tmp_path / "a.mp4", scene, fps)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert float(container.streams.video[0].average_rate) == fps
    expected = render(scene, frame_times(scene, fps))
    assert len(frames) == len(expected) == 2 * fps
    assert np.abs(np.stack(frames).astype(int) - expected).mean() < 4
    assert np.array_equal(sampled_frames(tmp_path / "a.mp4", 2.0), np.stack(frames)[:: fps // 2])


def test_scenes_of_a_longer_film_follow_each_other(tmp_path):
    scenes = [sample_scene(np.random.default_rng(seed), 96, 96, 1.0) for seed in (1, 2)]
    write_video(tmp_path / "film.mp4", scenes, 8)
    frames = sampled_frames(tmp_path / "film.mp4", 8.0)
    assert len(frames) == 16
    for index, scene in ((2, scenes[0]), (10, scenes[1])):
        assert np.abs(frames[index].astype(int) - render(scene, [0.25])[0]).mean() < 5


def test_films_of_mixed_or_odd_sizes_are_refused(tmp_path):
    small, large, odd = (sample_scene(np.random.default_rng(0), w, h, 1.0) for w, h in ((96, 96), (112, 96), (97, 96)))
    with pytest.raises(ValueError, match="one frame size"):
        write_video(tmp_path / "a.mp4", [small, large])
    with pytest.raises(ValueError, match="even width"):
        write_video(tmp_path / "a.mp4", odd)


def test_the_demo_is_deterministic_and_tells_the_truth(tmp_path):
    first, second = (render_demo(tmp_path / name, 3, seed=5) for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    rows = [json.loads(line) for line in first.read_text().splitlines()]
    assert [row["file"] for row in rows] == ["clip-000.mp4", "clip-001.mp4", "clip-002.mp4"]
    for index, row in enumerate(rows):
        assert (tmp_path / "a" / row["file"]).read_bytes() == (tmp_path / "b" / row["file"]).read_bytes()
        scene, _ = demo_scene(index, 5)
        assert all(thing.name in row["caption"] for thing in scene.things)
        assert row["answers"][0]["answer"] == row["caption"]
    assert render_demo(tmp_path / "c", 3, seed=6).read_bytes() != first.read_bytes()
