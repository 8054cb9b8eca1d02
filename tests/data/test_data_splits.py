"""Which image is for training, validation and test."""

from fractions import Fraction

import numpy as np
import pytest
from pictures import write_folder, write_tar, write_zip
from refusals import refused

from bvae.data.archive import open_source
from bvae.data.splits import OUTSIDE, TEST, TRAIN, UNLISTED, VAL, hold_out, make_plan, parse_fractions, parse_list

LIST = "000001.jpg 0\n000002.jpg 1\n000003.jpg 2\n000009.jpg 0\n"
CSV = "image_id,partition\n000001.jpg,0\n000002.jpg,1\n000003.jpg,2\n000009.jpg,0\n"
FACES = {f"img_align_celeba/00000{n}.jpg": b"x" for n in (1, 2, 3)}


def parts(source, **options):
    plan = make_plan(source, **options)
    return {item.name.rpartition("/")[2]: int(part) for item, part in zip(source.items, plan.part, strict=True)}, plan


@pytest.mark.parametrize(("name", "text"), [("list_eval_partition.txt", LIST), ("list_eval_partition.csv", CSV)])
def test_the_official_list_is_found_in_the_archive_beside_it_and_by_name(tmp_path, name, text):
    expected = {"000001.jpg": TRAIN, "000002.jpg": VAL, "000003.jpg": TEST}
    for path in (
        write_zip(tmp_path / "inside.zip", FACES | {f"Eval/{name}": text.encode()}),
        write_tar(tmp_path / "inside.tar.gz", {name: text.encode()} | FACES, "w:gz"),
        write_folder(tmp_path / "inside", FACES | {f"Eval/{name}": text.encode()}),
    ):
        found, plan = parts(open_source(path))
        assert found == expected
        assert plan.description["lines_without_image"] == 1 and plan.description["images_not_in_list"] == 0
    (tmp_path / "elsewhere.txt").write_text(text)
    bare = write_zip(tmp_path / "bare.zip", FACES)
    assert parts(open_source(bare), partition=tmp_path / "elsewhere.txt")[0] == expected
    (tmp_path / name).write_text(text)
    write_folder(tmp_path / "img_align_celeba", FACES)
    for path in (bare, tmp_path / "bare*.zip", tmp_path / "img_align_celeba"):
        assert parts(open_source(path))[0] == expected


def test_kaggles_layout(tmp_path):
    files = {f"img_align_celeba/img_align_celeba/00000{n}.jpg": b"x" for n in (1, 2, 3)}
    path = write_zip(tmp_path / "archive.zip", files | {"list_eval_partition.csv": CSV.encode()})
    assert parts(open_source(path))[0] == {"000001.jpg": TRAIN, "000002.jpg": VAL, "000003.jpg": TEST}


def test_a_list_beside_the_archive_in_a_folder(tmp_path):
    (tmp_path / "CelebA" / "Img").mkdir(parents=True)
    write_zip(tmp_path / "CelebA" / "Img" / "img_align_celeba.zip", FACES)
    write_folder(tmp_path / "CelebA", {"Eval/list_eval_partition.txt": LIST.encode()})
    assert parts(open_source(tmp_path / "CelebA"))[0] == {"000001.jpg": TRAIN, "000002.jpg": VAL, "000003.jpg": TEST}


def test_images_that_the_list_does_not_name_and_lists_of_other_images(tmp_path):
    source = open_source(write_zip(tmp_path / "a.zip", FACES | {"x/unknown.jpg": b"x"}))
    (tmp_path / "list_eval_partition.txt").write_text(LIST)
    found, plan = parts(source)
    assert found["unknown.jpg"] == UNLISTED and plan.description["images_not_in_list"] == 1
    other = open_source(write_zip(tmp_path / "b.zip", {f"{n}.png": b"x" for n in range(20)}))
    assert parts(other)[1].description["by"] == "fractions"
    refused(lambda: make_plan(other, partition=tmp_path / "list_eval_partition.txt"), "none of the 20")
    one_part = open_source(write_zip(tmp_path / "c.zip", {"000001.jpg": b"x"}))
    refused(lambda: make_plan(one_part), "no image is for test")


def test_celebas_list_serves_for_its_images_in_another_format(tmp_path):
    source = open_source(write_zip(tmp_path / "a.zip", {f"img/00000{n}.png": b"x" for n in (1, 2, 3, 4)}))
    (tmp_path / "list_eval_partition.txt").write_text(LIST)
    assert make_plan(source).part.tolist() == [TRAIN, VAL, TEST, UNLISTED]


def test_a_list_may_name_whole_paths(tmp_path):
    names = ["a/1.png", "b/1.png", "c/1.png"]
    source = open_source(write_zip(tmp_path / "a.zip", dict.fromkeys(names, b"x")))
    (tmp_path / "list.csv").write_text("a/1.png,0\nb/1.png,2\nc/1.png,0\n")
    assert make_plan(source, partition=tmp_path / "list.csv").part.tolist() == [TRAIN, TEST, TRAIN]


def test_lists_in_all_their_forms():
    expected = {"a b.jpg": TRAIN, "c.jpg": TEST}
    for text in (
        "a b.jpg 0\nc.jpg 2\n",
        "\ufeffa b.jpg 0\r\nc.jpg 2",
        "a b.jpg\t0\n\n  c.jpg   2  \n",
        "image_id,partition\na b.jpg,0\nc.jpg,2\n",
        '"a b.jpg", 0\n"c.jpg",2\nc.jpg,2\n',
        "a b.jpg train\nc.jpg test\n",
        "a b.jpg,Training\nc.jpg,eval\n",
        "label,filename,split\n7,a b.jpg,train\n8,c.jpg,test\n",
        'partition,image_id\n0,a b.jpg\n2,"c.jpg"\n',
    ):
        assert parse_list(text.encode(), "list") == expected
    for text, word in (
        ("", "no lines"),
        ("heading only", "line 1"),
        ("a.jpg;0", "line 1"),
        ("a.jpg other\nb.jpg 0\n", "line 1"),
        ("a.jpg,other\nb.jpg,0\n", "line 1"),
        ("a.jpg 0\nb.jpg 3", "line 2"),
        ("a.jpg 0\nb.jpg", "line 2"),
        ("a.jpg 0\na.jpg 1", "another part"),
        ("name,part\nb.jpg,trainer", "line 2"),
        ("name,part,more\nb.jpg", "line 2"),
    ):
        refused(lambda text=text: parse_list(text.encode(), "list"), "list", word)
    refused(lambda: parse_list(b"\xff\xfe\x00", "list"), "not a partition list")


def test_sub_folders(tmp_path):
    files = {f"set/{part}/{n}.png": b"x" for part in ("train", "Valid", "test", "extra") for n in range(3)}
    for path in (
        write_folder(tmp_path / "a", files),
        write_zip(tmp_path / "a.zip", files | {"set/stray.png": b"x"}),
        write_tar(tmp_path / "a.tar", {f"deep/er/{name}": data for name, data in files.items()}),
    ):
        source = open_source(path)
        plan = make_plan(source, partition="folders")
        for item, part in zip(source.items, plan.part, strict=True):
            folder = item.name.split("/")[-2]
            assert part == {"train": TRAIN, "Valid": VAL, "test": TEST}.get(folder, OUTSIDE)
        assert plan.notes == (f"{(plan.part == OUTSIDE).sum()} images beside the splits left out",)
        refused(lambda source=source: make_plan(source), "extra", "--partition folders", "--partition none")
        assert OUTSIDE not in make_plan(source, partition="none").part


def test_sub_folders_without_a_test(tmp_path):
    files = {f"train/{n}.png": b"x" for n in range(30)} | {f"val/{n}.png": b"x" for n in range(5)}
    source = open_source(write_folder(tmp_path / "a", files))
    part = make_plan(source, seed=3).part
    assert [(part == which).sum() for which in (TRAIN, VAL, TEST)] == [27, 5, 3]
    (tmp_path / "a" / "test").mkdir()
    refused(lambda: make_plan(open_source(tmp_path / "a")), "test", "no images")
    # Without `train`, images for test are trained on only where the user says so.
    source = open_source(write_folder(tmp_path / "b", {"test/1.png": b"x", "val/2.png": b"x"}))
    refused(lambda: make_plan(source), "test, val", "no `train`", "--partition none")
    assert sorted(make_plan(source, partition="none").part.tolist()) == [TRAIN, TEST]
    refused(lambda: make_plan(source, partition="folders"), "no image is for train")


def test_splits_are_drawn_among_images_that_may_be_of_use(tmp_path):
    write_folder(tmp_path / "a", {f"{n}.png": b"x" for n in range(10)})
    for n in range(90):
        (tmp_path / "a" / f"link{n}.png").symlink_to("nothing")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "train").symlink_to(tmp_path / "a")
    for source, fractions in (("a", None), ("b", None), ("a", "0.8,0.1,0.1")):
        opened = open_source(tmp_path / source)
        for seed in range(5):
            plan = make_plan(opened, fractions=fractions and parse_fractions(fractions), seed=seed)
            (test,) = np.flatnonzero(plan.part == TEST)
            assert "link" not in opened.items[test].name and (plan.part >= TRAIN).all()
            assert (plan.part == VAL).sum() == (1 if fractions else 0)


def test_fractions_and_seed(tmp_path):
    source = open_source(write_zip(tmp_path / "a.zip", {f"{n:03}.png": b"x" for n in range(100)}))
    plan = make_plan(source, fractions=parse_fractions("0.7,0.2,0.1"), seed=1)
    assert [(plan.part == which).sum() for which in (TRAIN, VAL, TEST)] == [70, 20, 10]
    assert (plan.part == make_plan(source, fractions=parse_fractions("0.7,0.2,0.1"), seed=1).part).all()
    assert (plan.part != make_plan(source, fractions=parse_fractions("0.7,0.2,0.1"), seed=2).part).any()
    # By default the images that a .npy of them would give up.
    assert (np.flatnonzero(make_plan(source, seed=5).part == TEST) == np.sort(hold_out("", np.arange(100), 5))).all()
    assert parse_fractions("8/10,1/10,0.1") == (Fraction(4, 5), Fraction(1, 10), Fraction(1, 10))
    for text in ("1e99999999,0,0", "0.5,0.5", "0.5,0.6,0.1", "1.1,-0.1,0", "a,b,c", ""):
        with pytest.raises(ValueError):
            parse_fractions(text)
    refused(lambda: make_plan(source, fractions=parse_fractions("1,0,0")), "no image is for test")
    refused(lambda: make_plan(source, fractions=parse_fractions("0,0.5,0.5")), "no image is for train")
    refused(
        lambda: make_plan(source, fractions=parse_fractions("1,0,0"), partition=tmp_path / "x"),
        "--partition",
        "--split",
    )
    single = open_source(write_zip(tmp_path / "b.zip", {"a.png": b"x"}))
    refused(lambda: make_plan(single), "single image")


def test_lists_that_cannot_be_read(tmp_path):
    source = open_source(write_zip(tmp_path / "a.zip", FACES))
    refused(lambda: make_plan(source, partition=tmp_path / "absent.txt"), tmp_path / "absent.txt", "No such file")
    refused(lambda: make_plan(source, partition=tmp_path), "directory")
    source = open_source(write_zip(tmp_path / "b.zip", FACES | {"list_eval_partition.txt": b"\0\1 nonsense\nand more"}))
    refused(lambda: make_plan(source), tmp_path / "b.zip[list_eval_partition.txt]", "line 2")
    folder = write_folder(tmp_path / "c", FACES | {"list_eval_partition.txt": b"a.jpg 7\nb"})
    refused(lambda: make_plan(open_source(folder)), folder / "list_eval_partition.txt", "line 1")
