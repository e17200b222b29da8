"""Words become classes, and pixels become files."""

import asyncio
import base64
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from serving_parts import CLASSES

from actors.serving import pictures as picture_files
from actors.serving.pictures import encoded, pictures
from actors.serving.prompts import classes_meant, label_of

CLOTHES = ("T-shirt/top", "boot", "ankle boot", "Straße", "42", "crème brûlée")


# Prompts


@pytest.mark.parametrize(
    ("prompt", "label"),
    [
        ("three", 3), ("THREE", 3), ("3", 3), ("a three, please", 3), ("draw the digit 3.", 3), ("003", 3),
        ("three, I said three (3)!", 3), ("\uff13", 3), ("what is seven?", 7), ("class_9", 9),
        ("a\n\tfour", 4),
    ],
)  # fmt: skip
def test_a_prompt_means_the_class_that_it_names(prompt, label):
    assert label_of(prompt, CLASSES) == label


@pytest.mark.parametrize(
    ("prompt", "labels"),
    [
        ("an Ankle  Boot", [2]), ("a boot", [1]), ("boot on an ankle boot", [1, 2]), ("t-SHIRT / top", [0]),
        ("STRASSE", [3]), ("42", [4]), ("number 4", [4]), ("cre\u0300me bru\u0302le\u0301e", [5]),
        ("T shirt", []), ("boots", []),
    ],
)  # fmt: skip
def test_names_of_several_words_are_found_whole(prompt, labels):
    assert classes_meant(prompt, CLOTHES) == labels


@pytest.mark.parametrize("prompt", ["", "a cat", "-3", "3.5", "1,2", "10", "9" * 5000, "threefold", "3rd"])
def test_a_prompt_without_a_class_is_told_all_of_them(prompt):
    with pytest.raises(ValueError, match=r"names no class: name one of zero \(0\), one \(1\), .*nine \(9\)$"):
        label_of(prompt, CLASSES)


def test_a_prompt_with_two_classes_is_told_which():
    with pytest.raises(ValueError, match=r"names 2 classes, two \(2\), five \(5\): name exactly one"):
        label_of("five or 2", CLASSES)


def test_a_name_that_two_classes_share_means_both():
    assert classes_meant("one dog", ("dog", "Dog", "cat")) == [0, 1]
    assert label_of("2", ("dog", "Dog", "cat")) == 2


def test_a_long_list_of_classes_is_cut_short():
    with pytest.raises(ValueError, match=r"c19 \(19\), and 980 more") as caught:
        label_of("nothing", [f"c{label}" for label in range(1000)])
    assert len(str(caught.value)) < 400


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 9), st.booleans(), st.lists(st.sampled_from(["a", "draw", "-", "!", "of", "\u00e9"])))
def test_other_words_around_a_class_do_not_matter(label, by_name, words):
    words.insert(len(words) // 2, CLASSES[label] if by_name else str(label))
    assert classes_meant(" ".join(words), CLASSES) == [label]


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200))
def test_any_text_means_some_classes_or_none(text):
    assert set(classes_meant(text, CLASSES)) <= set(range(10))


# Files


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("factor", [1, 3])
def test_png_keeps_every_pixel_and_repeats_it(channels, factor):
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 4, channels), np.uint8)
    files = [base64.b64decode(file) for file in encoded(images, factor, "png", 100)]
    for image, file in zip(images, files, strict=True):
        read = Image.open(io.BytesIO(file))
        assert (read.format, read.size) == ("PNG", (4 * factor, 5 * factor))
        wanted = np.kron(image, np.ones((factor, factor, 1), np.uint8))
        assert (np.asarray(read).reshape(wanted.shape) == wanted).all()


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_equal_pixels_give_equal_files(form):
    images = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), np.uint8)
    first, second = (encoded(images.copy(), 2, form, 90) for _ in range(2))
    assert first == second
    assert Image.open(io.BytesIO(base64.b64decode(first[0]))).format == form.upper()


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_more_quality_makes_larger_files_with_less_error(form):
    slope = np.linspace(0, 255, 32, dtype=np.uint8)
    image = np.broadcast_to(slope[:, None, None], (32, 32, 3)).copy()
    image[8:24, 8:24] ^= 0x3F
    files = [base64.b64decode(encoded(image[None], 1, form, quality)[0]) for quality in (0, 50, 100)]
    gaps = [np.abs(np.asarray(Image.open(io.BytesIO(file))).astype(int) - image).mean() for file in files]
    assert len(files[0]) < len(files[1]) < len(files[2])
    assert gaps[0] > gaps[1] > gaps[2]


@pytest.mark.parametrize(
    "images", [np.zeros((1, 4, 4, 2), np.uint8), np.zeros((4, 4, 3), np.uint8), np.zeros((1, 4, 4, 1))]
)
def test_what_is_no_image_is_not_written(images):
    with pytest.raises(ValueError, match="uint8"):
        encoded(images, 1, "png", 100)


def test_large_pictures_leave_the_event_loop_free(monkeypatch):
    threads = []

    async def to_thread(function, *arguments):
        threads.append(function)
        return function(*arguments)

    monkeypatch.setattr(picture_files.asyncio, "to_thread", to_thread)
    images = np.zeros((4, 8, 8, 1), np.uint8)
    small = asyncio.run(pictures(images, 16, "png", 100))
    assert threads == []
    large = asyncio.run(pictures(images, 17, "png", 100))
    assert threads == [encoded]
    assert (len(small), len(large)) == (4, 4)
