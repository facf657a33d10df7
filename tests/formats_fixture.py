"""One tiny scene of objects, written in the layout of each tool that people label with."""

import json
import os
from pathlib import Path

import cv2
import numpy as np

NAMES = ("ant", "bee", "cat")
COLORS = {"ant": (220, 60, 60), "bee": (60, 200, 90), "cat": (70, 90, 230)}
SIZES = ((96, 64), (64, 96), (80, 80))


def scene(n=6, first=0):
    """{name of an image: (size, [(class, x, y, w, h in whole pixels)])}; the last has no objects."""
    found = {}
    for i in range(first, first + n):
        rng = np.random.default_rng([5, i])
        width, height = SIZES[i % len(SIZES)]
        objects = []
        for half in range(2) if i < first + n - 1 else ():
            w, h = rng.integers(12, width // 2 - 4), rng.integers(12, height - 8)
            x, y = half * (width // 2) + rng.integers(1, 4), rng.integers(1, height - h)
            objects.append((NAMES[(i + half) % 3], int(x), int(y), int(w), int(h)))
        found[f"photo {i:03d}.png"] = ((width, height), objects)
    return found


def write_image(file, size, objects=(), shade=60):
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((size[1], size[0], 3), shade, np.uint8)
    for name, x, y, w, h in objects:
        pixels[y : y + h, x : x + w] = COLORS[name]
    assert cv2.imwrite(str(file), pixels[:, :, ::-1])


def write_images(folder, images):
    for i, (name, (size, objects)) in enumerate(images.items()):
        write_image(folder / name, size, objects, 40 + 10 * i + len(folder.name))


def write_text(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


# --- COCO -------------------------------------------------------------------------------------------------


def coco(images, file_name="{}", polygons=False, names=NAMES, crowds=False):
    """COCO content; ids from 1 in the order given."""
    content = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [{"id": k, "name": name, "supercategory": ""} for k, name in enumerate(names, 1)]
    for id, (name, ((width, height), objects)) in enumerate(images.items(), 1):
        image = {"id": id, "file_name": file_name.format(name), "width": width, "height": height}
        content["images"].append(image)
        for kind, x, y, w, h in objects:
            own = {
                "id": len(content["annotations"]) + 1,
                "image_id": id,
                "category_id": 1 + names.index(kind),
            }
            own |= {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
            if polygons:
                own["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            content["annotations"].append(own)
    return content


def write_json(file, content):
    return write_text(file, json.dumps(content))


# --- Pascal VOC -------------------------------------------------------------------------------------------


def xml_of(name, size, objects, flags=""):
    """VOC's pixels count from 1, and the last one belongs to the box."""
    text = f"<annotation>\n<filename>{name}</filename>\n<size><width>{size[0]}</width><height>{size[1]}</height></size>\n"
    for kind, x, y, w, h in objects:
        corners = f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax>"
        text += f"<object>\n<name>{kind}</name>{flags}\n<bndbox>{corners}</bndbox>\n</object>\n"
    return text + "</annotation>\n"


def write_voc(root, splits, xml="Annotations", jpeg="JPEGImages", lists="ImageSets/Main"):
    """``{split: images}`` as VOC has it; without ``lists`` no split is said."""
    for split, images in splits.items():
        write_images(root / jpeg, images)
        for name, (size, objects) in images.items():
            write_text(root / xml / f"{Path(name).stem}.xml", xml_of(name, size, objects))
        if lists:
            text = "".join(f"{Path(name).stem}\n" for name in images)
            write_text(root / lists / f"{split}.txt", text)
            write_text(root / lists / f"ant_{split}.txt", text.replace("\n", "  1\n"))
    return root


# --- YOLO -------------------------------------------------------------------------------------------------


def yolo_lines(size, objects, polygons=False, numbers=None):
    numbers = numbers or {name: k for k, name in enumerate(NAMES)}
    lines = []
    for kind, x, y, w, h in objects:
        corners = (
            [(x, y), (x + w, y), (x + w, y + h), (x, y + h)] if polygons else [(x + w / 2, y + h / 2), (w, h)]
        )
        values = [value / size[axis] for corner in corners for axis, value in enumerate(corner)]
        lines.append(" ".join([str(numbers[kind]), *(f"{value:.9f}" for value in values)]))
    return "".join(f"{line}\n" for line in lines)


def write_yolo(root, splits, images="images/{}", labels="labels/{}", yaml=None, **how):
    """``{split: images}``; an image without objects has no label file."""
    for split, own in splits.items():
        write_images(root / images.format(split), own)
        (root / labels.format(split)).mkdir(parents=True, exist_ok=True)
        for name, (size, objects) in own.items():
            if objects:
                write_text(
                    root / labels.format(split) / f"{Path(name).stem}.txt", yolo_lines(size, objects, **how)
                )
    if yaml is not None:
        write_text(root / "data.yaml", yaml)
    return root


def plain(content):
    """What the formats have in common: {image: (size, [(class, box)])}, whatever the ids."""
    names = {each["id"]: each["name"] for each in content["categories"]}
    found = {
        each["id"]: (os.path.basename(each["file_name"]), (each["width"], each["height"]), [])
        for each in content["images"]
    }
    for each in content["annotations"]:
        found[each["image_id"]][2].append((names[each["category_id"]], *np.round(each["bbox"], 4).tolist()))
    return {name: (size, objects) for name, size, objects in found.values()}
