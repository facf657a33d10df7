"""Pascal VOC: one .xml file an image.

Folders: ``Annotations/``, ``JPEGImages/`` and perhaps ``ImageSets/Main/{train,val,trainval,test}.txt``;
``annotations/`` beside ``images/``; .xml files beside their images; each also once a split (``train/``,
``valid/``, ``test/``). A file and its image have the same name; ``<filename>`` is asked where they have not, or where
several images have it.

VOC counts pixels from 1, and the last one belongs to the box: ``xmin`` - 1 and ``ymin`` - 1 are its first corner,
``xmax`` and ``ymax`` its last, as in Detectron2 (torchvision hands the numbers through). Where the corners are
equal, somebody has clicked and not drawn: such a box has no area. Corners in the wrong order are put in the right
one. A box that CVAT has turned becomes the upright one around it. Both are said.

``difficult`` objects are what COCO calls crowds: left out of training, ignored in evaluation as VOC's own does it;
``--crowds objects`` takes them as objects. Classes are the names of all splits, in the alphabet's order. Masks
(``SegmentationObject/``) are not read.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from det_plugin.coco.content import (
    ALONE,
    DAMAGED,
    ROTATED_BOXES,
    SPLIT_NAMES,
    UNLABELED,
    Content,
    Stamp,
    around_rotated,
    field_shown,
    is_image,
    listed,
    read_once,
    split_folders,
    stem_of,
    sub_folder,
    upright_sizes,
)
from pretrain.data.box_sets import CORNERS, FARTHEST_PX, read_xml
from pretrain.settings import shown

XML_FOLDERS = ("annotations", "annotation", "xml", "xmls", "labels")
IMAGE_FOLDERS = ("jpegimages", "images", "image", "imgs", "img")
CROWDS = "difficult, as crowds (iscrowd 1) are"  # what messages call them
SWAPPED = "boxes whose corners are in the wrong order, which are put in the right one"
SHAPES = ("robndbox", "polygon")  # without a box
FLAG = {"1": 1, "true": 1, "0": 0, "false": 0, "": 0}


@dataclass(frozen=True)
class Part:
    """The files of a split.

    Attributes:
        folder, images: of the .xml files, and of the images.
        xmls, pictures: paths below these.
        file: the list of its names, if there is one; else ``folder``.
        absent: lines of the list without an .xml file.
    """

    folder: Path
    images: Path
    xmls: dict[str, Stamp]
    pictures: dict[str, Stamp]
    file: Path
    absent: list[str] = field(default_factory=list)


def find(root: Path) -> dict[str, Part]:
    """The splits of a folder by our names (``all`` where nothing says which), none if it holds no VOC files."""
    found = {split: part for split, at in split_folders(root).items() if (part := _pair(at)) is not None}
    if found:
        return found
    whole = _pair(root)
    if whole is None:
        return {}
    return _listed_splits(root, whole) or _split_below(whole) or {"all": whole}


def stamp_of(parts: dict[str, Part]) -> int:
    """A number that is another one when a file is."""
    every = ((name, *part.absent, *part.xmls.items(), *part.pictures.items()) for name, part in parts.items())
    return hash(tuple(every))


def read(root: Path, split: str, stamp: int) -> Content:
    """COCO content of a split of :func:`find`, whose stamp it was."""
    return read_once(("voc", root, stamp), split, lambda: _read(find(root)))


def _pair(folder: Path) -> Part | None:
    """A folder of .xml files and one of images, in a folder; or both in itself."""
    at = sub_folder(folder, XML_FOLDERS)
    xmls = _xmls(at) if at else {}
    if not at or not xmls:
        at, xmls = folder, _xmls(folder, deep=False)
    if not xmls or not _is_voc(at / next(iter(xmls))):
        return None
    images = sub_folder(folder, IMAGE_FOLDERS) or folder
    pictures = {name: stamp for name, stamp in listed(images).items() if is_image(name)}
    return Part(at, images, xmls, pictures, at)


def _xmls(folder: Path, deep: bool = True) -> dict[str, Stamp]:
    return {name: stamp for name, stamp in listed(folder, deep).items() if name.lower().endswith(".xml")}


def _is_voc(file: Path) -> bool:
    """Whether it is no other kind of XML; a damaged file is reported when it is read."""
    try:
        return read_xml(file).tag == "annotation"
    except ValueError:
        return True


def _listed_splits(root: Path, whole: Part) -> dict[str, Part]:
    """The splits of ``ImageSets/Main``. Lists by class (``dog_train.txt``) are no splits."""
    folder = sub_folder(root, ("imagesets",))
    folder = (folder and sub_folder(folder, ("main",))) or folder
    lists = {file.stem.lower(): file for file in sorted(folder.glob("*.txt"))} if folder else {}
    by_split = {split: lists[name] for split, names in SPLIT_NAMES.items() for name in names if name in lists}
    if "trainval" in lists and not {"train", "val"} <= by_split.keys():
        by_split = {"train": lists["trainval"], **{k: v for k, v in by_split.items() if k == "test"}}
    if not by_split and len(lists) == 1:
        by_split = {"all": next(iter(lists.values()))}
    return {split: _of_list(file, whole) for split, file in by_split.items()}


def _of_list(file: Path, whole: Part) -> Part:
    chosen, absent = dict[str, Stamp](), list[str]()
    names = {stem_of(name): name for name in whole.xmls}
    names |= {name.rpartition("/")[2]: xml for name, xml in names.items()}
    for number, line in enumerate(file.read_text(encoding="utf-8-sig", errors="replace").splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        # A name may have spaces, and a number behind it
        tries = [line, re.sub(r"\s+-?[01]$", "", line), line.split()[0]]
        tries += [each.rpartition("/")[2] for each in tries]
        tries += [stem_of(each) for each in tries if is_image(each)]
        xml = next((names[each] for each in tries if each in names), None)
        if xml is None:
            absent.append(f"{file}:{number}: {whole.folder} has no {shown(line)[1:-1]}.xml")
        else:
            chosen[xml] = whole.xmls[xml]
    return Part(whole.folder, whole.images, dict(sorted(chosen.items())), whole.pictures, file, absent)


def _split_below(whole: Part) -> dict[str, Part]:
    """``annotations/train/*.xml`` with ``images/train/*.jpg``."""
    found = {}
    for split, names in SPLIT_NAMES.items():
        for name in names:
            own = {xml: stamp for xml, stamp in whole.xmls.items() if xml.lower().startswith(f"{name}/")}
            if own:
                at = whole.folder / next(iter(own)).partition("/")[0]
                found[split] = Part(whole.folder, whole.images, own, whole.pictures, at)
    return found if sum(len(part.xmls) for part in found.values()) == len(whole.xmls) else {}


@dataclass
class _Labels:
    """What an .xml file says of its image."""

    picture: str  # below the folder of images
    size: tuple[int, int] | None
    objects: list[tuple[str, list[float], int]]  # name, x, y, width, height, difficult


def _read(parts: dict[str, Part]) -> dict[str, Content]:
    labels, faults = dict[str, list[_Labels]](), dict[str, dict[str, list[str]]]()
    for split, part in parts.items():
        labels[split], faults[split] = _read_part(part)
    names = sorted({name for own in labels.values() for each in own for name, _, _ in each.objects})
    used = {(part.images, each.picture) for split, part in parts.items() for each in labels[split]}
    for split, part in parts.items():
        left = [name for name in part.pictures if (part.images, name) not in used]
        if left and part.file == part.folder:  # a list says itself what belongs to the set
            faults[split][UNLABELED] = left
    ids = {name: number for number, name in enumerate(names, 1)}
    return {split: _content(parts[split], labels[split], ids, dict(faults[split])) for split in parts}


def _read_part(part: Part) -> tuple[list[_Labels], dict[str, list[str]]]:
    find = _finder(part.pictures)
    found, faults = list[_Labels](), defaultdict[str, list[str]](list)
    faults[DAMAGED] += part.absent
    for xml in part.xmls:
        file = part.folder / xml
        try:
            tree = read_xml(file)
        except ValueError as error:
            faults[DAMAGED].append(f"{file}: {error}")
            continue
        told = (tree.findtext("filename") or "").strip().replace("\\", "/").rpartition("/")[2]
        pictures = find(stem_of(xml), told)
        if not pictures:
            faults[ALONE].append(xml)
            continue
        if len(pictures) > 1:
            names = ", ".join(pictures)
            faults[DAMAGED].append(f"{file}: it may be of {names}; name one in <filename>")
            continue
        labels = _Labels(pictures[0], _size(tree), [])
        for number, element in enumerate(tree.findall("object"), 1):
            try:
                name, box, difficult, odd = _object(element)
                labels.objects.append((name, box, difficult))
                for kind in odd:
                    faults[kind].append(f"{file}:{_line(file, number)}")
            except ValueError as error:
                faults[DAMAGED].append(f"{file}:{_line(file, number)}: object {number} has {error}")
        found.append(labels)
    for name, n in Counter(each.picture for each in found).items():
        if n > 1:
            faults[DAMAGED].append(f"{part.folder}: {n} .xml files are of {name}; keep one")
    return sorted(found, key=lambda each: each.picture), {kind: own for kind, own in faults.items() if own}


def _finder(pictures: Iterable[str]) -> Callable[[str, str], list[str]]:
    """A function of the stem of an .xml file and its ``<filename>`` that gives the images it may be of."""
    own = list(pictures)
    names, stems, bases, base_stems = set(own), *(defaultdict[str, list[str]](list) for _ in "123")
    for name in own:
        base = name.rpartition("/")[2]
        stems[stem_of(name)].append(name)
        bases[base].append(name)
        base_stems[stem_of(base)].append(name)

    def find(stem: str, told: str) -> list[str]:
        base = stem.rpartition("/")[2]
        if stem in names:  # a.jpg.xml
            return [stem]
        by_stem = stems.get(stem) or base_stems.get(base) or bases.get(base) or []
        if len(by_stem) > 1:
            return [name for name in by_stem if name.rpartition("/")[2] == told] or by_stem
        return by_stem or bases.get(told) or base_stems.get(told) or base_stems.get(stem_of(told)) or []

    return find


def _line(file: Path, number: int) -> int:
    """Where the object of a number stands."""
    text = file.read_bytes().decode("utf-8", "replace")
    starts = [match.start() for match in re.finditer(r"<object\b", text)]
    return text.count("\n", 0, starts[number - 1]) + 1 if len(starts) >= number else 1


def _size(tree: Element) -> tuple[int, int] | None:
    """Width and height, if they are said; some tools write 0."""
    try:
        width, height = (int(tree.findtext(f"size/{side}", "")) for side in ("width", "height"))
    except ValueError:
        return None
    return (width, height) if width > 0 and height > 0 else None


def _object(element: Element) -> tuple[str, list[float], int, list[str]]:
    """Name, box (x, y, width, height), difficult, and the kinds of what is odd about the box.

    Raises:
        ValueError: one is missing or no such; says which.
    """
    texts = {child.tag: (child.text or "").strip() for child in element}
    name, flag = texts.get("name"), texts.get("difficult", "")
    if not name:
        raise ValueError("no <name>")
    if flag.lower() not in FLAG:
        raise ValueError(f"the <difficult> {field_shown(flag)}, not 0 or 1")
    x0, y0, x1, y1 = _corners(element)
    odd = [SWAPPED] if x1 < x0 or y1 < y0 else []
    (x0, x1), (y0, y1) = sorted((x0, x1)), sorted((y0, y1))
    has_area = x1 > x0 and y1 > y0
    box = [x0 - 1, y0 - 1, *([x1 - x0 + 1, y1 - y0 + 1] if has_area else [x1 - x0, y1 - y0])]
    if turned := around_rotated(box, _attribute(element, "rotation")):
        box, odd = turned, [*odd, ROTATED_BOXES]
    return name, box, FLAG[flag.lower()], odd


def _corners(element: Element) -> list[float]:
    """The numbers of the ``<bndbox>``.

    Raises:
        ValueError: names the one that is missing or no number of pixels.
    """
    at, corners = element.find("bndbox"), list[float]()
    what = f"no <bndbox> of four numbers {', '.join(CORNERS)}"
    if at is None:
        others = [child.tag for child in element if child.tag in SHAPES]
        raise ValueError(f"{what}, but a <{others[0]}>" if others else what)
    for corner in CORNERS:
        text = at.findtext(corner)
        try:
            corners.append(float(text or ""))
            if not abs(corners[-1]) <= FARTHEST_PX:
                raise ValueError
        except ValueError:
            told = f"the <{corner}> {field_shown(text)}" if text else f"no <{corner}>"
            raise ValueError(f"{what} ({told})") from None
    return corners


def _attribute(element: Element, name: str) -> str:
    """An attribute of an object, as CVAT writes them; empty if it has none."""
    own = (each for each in element.iterfind("attributes/attribute") if each.findtext("name") == name)
    return next((each.findtext("value") or "" for each in own), "")


def _content(part: Part, labels: list[_Labels], ids: dict[str, int], faults: dict[str, list[str]]) -> Content:
    unsaid = [each for each in labels if each.size is None]
    for each, size in zip(unsaid, upright_sizes(part.images / each.picture for each in unsaid)):
        each.size = size or (1, 1)  # an unreadable image is named when it is opened
    images, annotations = list[dict[str, Any]](), list[dict[str, Any]]()
    for image_id, each in enumerate(labels, 1):
        width, height = each.size or (1, 1)
        images.append({"id": image_id, "file_name": each.picture, "width": width, "height": height})
        for name, box, difficult in each.objects:
            whole = {"id": len(annotations) + 1, "image_id": image_id, "category_id": ids[name], "bbox": box}
            annotations.append({**whole, "area": box[2] * box[3], "iscrowd": difficult})
    categories = [{"id": id, "name": name} for name, id in ids.items()]
    lists = {"images": images, "annotations": annotations, "categories": categories}
    return {**lists, "faults": faults, "crowds": CROWDS}
