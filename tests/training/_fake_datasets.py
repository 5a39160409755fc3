"""Tiny copies of the published data sets, with their exact file names; each function returns what it wrote."""

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image
from scipy import sparse

# Left is -i in this one and +i in the other, as published files differ.
RAS = np.diag([4.0, 4.0, 6.0, 1.0])
LAS = np.diag([-4.0, 4.0, 6.0, 1.0])


def body(shape=(24, 20, 12), seed=0) -> np.ndarray:
    """(I, J, K) int16 HU: an ellipse of soft tissue in air, with noise."""
    i, j, k = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    noise = np.random.default_rng(seed).normal(0, 20, shape)
    return np.where(i**2 + j**2 < 0.8, 40 + noise, -1000).astype(np.int16)


def blob(shape, centre, radius=3) -> np.ndarray:
    """(I, J, K) bool ball."""
    grid = np.indices(shape).astype(float)
    return sum((g - c) ** 2 for g, c in zip(grid, centre)) <= radius**2


def save(path: Path, array: np.ndarray, affine=RAS) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return array


def table(path: Path, columns: list[str], rows: list[list], delimiter=",", encoding="utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding=encoding) as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(columns)
        writer.writerows(rows)


def ct_org(root: Path, count=2) -> dict[int, np.ndarray]:
    labels = {}
    for n in range(20, 20 + count):
        volume = save(root / "OrganSegmentations" / f"volume-{n}.nii.gz", body(seed=n))
        mask = np.zeros(volume.shape, np.uint8)
        mask[blob(mask.shape, (7, 10, 6))] = 1
        mask[blob(mask.shape, (16, 10, 6))] = 4
        labels[n] = save(root / "OrganSegmentations" / f"labels-{n}.nii.gz", mask)
    (root / "OrganSegmentations" / "README.txt").write_text("labels")
    return labels


def totalsegmentator(root: Path, affine=RAS) -> dict[str, np.ndarray]:
    masks = {}
    for case in ("s0000", "s0011", "s0287"):
        volume = save(root / case / "ct.nii.gz", body(seed=int(case[1:])), affine)
        for name, centre in (("kidney_left", (7, 10, 6)), ("kidney_right", (16, 10, 6)), ("liver", (15, 8, 9))):
            mask = blob(volume.shape, centre) & (name != "liver" or case != "s0011")
            masks[case, name] = save(root / case / "segmentations" / f"{name}.nii.gz", mask.astype(np.uint8), affine)
    columns = ["image_id", "age", "gender", "institute", "study_type", "split"]
    rows = [["s0000", 61, "m", "A", "ct abdomen", "val"], ["s0011", 44, "f", "B", "ct thorax", "test"]]
    rows.append(["s0287", 44, "f", "B", "ct thorax", "train"])
    table(root / "meta.csv", columns, rows, ";", "utf-8-sig")
    return masks


def m3d_seg(root: Path, code="0011", case="s0011", split="train", affine_sign=1) -> dict[str, np.ndarray]:
    """One case of one set: (W, H, D) masks by name. `affine_sign` -1 puts the left at high x, as stored."""
    base = root / "M3D_Seg"
    image = body(seed=3).astype(np.float32)
    values = image[image > image.mean()]
    image = (np.clip(image, *np.percentile(values, (0.05, 99.95))) - values.mean()) / values.std()
    centres = {"kidney left": (7, 10, 6), "kidney right": (16, 10, 6), "liver": (15, 8, 9), "spleen": None}
    masks = {}
    for name, centre in centres.items():
        mask = np.zeros(image.shape, bool) if centre is None else blob(image.shape, centre)
        masks[name] = mask[::affine_sign]
    stacked = np.stack(list(masks.values())).astype(np.int32)
    folder = base / code / case
    folder.mkdir(parents=True)
    np.save(folder / "image.npy", image[::affine_sign][None])
    sparse.save_npz(folder / f"mask_{stacked.shape}", sparse.csr_matrix(stacked.reshape(len(masks), -1)))
    pair = {"image": f"{code}/{case}/image.npy", "label": f"{code}/{case}/mask_{stacked.shape}.npz"}
    labels = {"0": "background", **{str(n): name for n, name in enumerate(masks, 1)}}
    document = {"name": f"{code} Dataset", "modality": {"0": "CT"}, "labels": labels, "train": [], "test": []}
    document[split] = [pair]
    (base / code / f"{code}.json").write_text(json.dumps(document))
    (base / "term_dictionary.json").write_text(json.dumps({"kidney left": ["Makes urine on the left side."] * 2}))
    return masks


def m3d_seg_prepared(root: Path) -> np.ndarray:
    folder = root / "M3D_Seg_npy" / "0003" / "case_1"
    (folder / "masks").mkdir(parents=True)
    image = np.random.default_rng(1).random((1, 8, 32, 32)).astype(np.float32)
    np.save(folder / "image.npy", image)
    mask = np.zeros((1, 8, 32, 32), bool)
    mask[0, 2:5, 8:20, 6:14] = True
    np.save(folder / "masks" / "mask_2.npy", mask)
    pair = {"image": "/publisher/M3D_Seg_npy/0003/case_1/image.npy"}
    pair["label"] = "/publisher/M3D_Seg_npy/0003/case_1/masks/mask_2.npy"
    labels = {"0": "background", "1": "liver", "2": "kidney", "3": "spleen", "4": "pancreas"}
    (root / "M3D_Seg_npy" / "0003" / "0003.json").write_text(
        json.dumps({"labels": labels, "train": [], "test": [pair]})
    )
    return mask


def m3d_refseg(root: Path) -> np.ndarray:
    base = root / "M3D_RefSeg"
    image = save(base / "s0287" / "ct.nii.gz", body(seed=5))
    mask = np.zeros(image.shape, np.uint8)
    mask[blob(mask.shape, (7, 10, 6))] = 1
    mask[blob(mask.shape, (16, 10, 6))] = 2
    save(base / "s0287" / "mask.nii.gz", mask)
    (base / "s0287" / "text.json").write_text(json.dumps({"1": "A cyst.", "2": "A stone."}))
    columns = ["Image", "Mask", "Mask_ID", "Question_Type", "Question", "Answer"]
    row = ["M3D_RefSeg_npy/s0287/ct.npy", "M3D_RefSeg_npy/s0287/mask.npy"]
    rows = [
        [*row, 1, 0, "Please segment the cyst in the left kidney.", "Sure, it is [SEG]."],
        [*row, 2, 1, "What causes colic?", "The stone: <SEG>."],
        [*row, 2, 1, "What causes colic?", "No mask is named here."],
    ]
    table(base / "M3D_RefSeg.csv", columns, rows)
    return mask


def m3d_cap(root: Path) -> dict[str, np.ndarray]:
    """A case as pictures and one as a prepared array; the same cases have questions."""
    pictures = np.random.default_rng(2).integers(0, 255, (11, 40, 36), np.uint8)
    folder = root / "M3D_Cap" / "ct_case" / "000006" / "Axial_non_contrast"
    folder.mkdir(parents=True)
    for number, plane in enumerate(pictures):
        Image.fromarray(plane).save(folder / f"{number}.png")
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(folder / "11.png")
    text = "title: x\nstudy_findings: The left kidney holds a stone.\nNo free fluid.\n"
    (folder.parent / "text.txt").write_text(text)
    array = np.random.default_rng(3).random((1, 8, 32, 32)).astype(np.float32)
    prepared = root / "M3D_Cap_npy" / "ct_quizze" / "000010"
    prepared.mkdir(parents=True)
    np.save(prepared / "Coronal_C__arterial_phase.npy", array)
    (prepared / "text.txt").write_text("A mass in the pancreas.")
    names = (
        "M3D_Cap_npy/ct_case/000006/Axial_non_contrast.npy",
        "M3D_Cap_npy/ct_quizze/000010/Coronal_C__arterial_phase.npy",
    )
    pairs = [{"image": name, "text": f"{name.rsplit('/', 1)[0]}/text.txt"} for name in names]
    listing = {"train": [pairs[0]], "validation": [], "test": [pairs[1]], "test500": [pairs[1]]}
    (root / "M3D_Cap" / "M3D_Cap.json").write_text(json.dumps(listing))
    return {"pictures": pictures, "array": array}


def m3d_vqa(root: Path) -> None:
    columns = ["Image Path", "Text", "Question Type", "Question", *(f"Choice {c}" for c in "ABCD")]
    columns += ["Answer", "Answer Choice"]
    image = "M3D_Cap_npy/ct_case/000006/Axial_non_contrast.npy"
    stone = ["Left kidney", "Right kidney", "Bladder", "Liver"]
    rows = [
        [image, "text", 1, "Which plane is shown?", "Axial", "Coronal", "Sagittal", "Oblique", "Axial", "A"],
        [image, "text", 5, "Where is the stone?", *stone, "Left kidney", "A"],
        [image, "text", 5, "Where is the mass?", "Liver", "", "", "", "Liver", "A"],
    ]
    table(root / "M3D-VQA" / "M3D_VQA_train.csv", columns, rows)
    yes_no = ["Image Path", "Text", "Question Type", "Question", "Answer"]
    table(root / "M3D-VQA" / "M3D_VQA_yn_train.csv", yes_no, [[image, "text", 4, "Is there a stone?", "Yes"]])


def ct_rate(root: Path) -> dict[str, np.ndarray]:
    """train_1 has two reconstructions, unscaled; valid_7 lies in the folder of repaired files."""
    base = root / "dataset"
    volumes = {}
    for name in ("train_1_a_1", "train_1_a_2"):
        stored = ((body(seed=8).astype(np.int32) + 1024) // 2).astype(np.int16)
        volumes[name] = save(base / "train" / "train_1" / "train_1_a" / f"{name}.nii.gz", stored)
    name = "valid_7_b_1"
    volumes[name] = save(base / "valid_fixed" / "valid_7" / "valid_7_b" / f"{name}.nii.gz", body(seed=9))
    columns = ["VolumeName", "ClinicalInformation_EN", "Technique_EN", "Findings_EN", "Impressions_EN"]
    rows = [[f"{n}.nii.gz", "Cough", "MDCT", "The left lung is clear.", "Normal, chest."] for n in list(volumes)[:2]]
    rows.append(["train_2_a_1.nii.gz", "", "", "", ""])
    table(base / "radiology_text_reports" / "train_reports.csv", columns, rows)
    rows = [["valid_7_b_1.nii.gz", "", "", "RUL nodule.\nNo effusion.", "Nodule."]]
    table(base / "radiology_text_reports" / "validation_reports.csv", columns, rows)
    meta = ["VolumeName", "RescaleSlope", "RescaleIntercept", "XYSpacing"]
    table(
        base / "metadata" / "train_metadata.csv", meta, [[f"{n}.nii.gz", 2, -1024, "[4, 4]"] for n in list(volumes)[:2]]
    )
    table(base / "metadata" / "validation_metadata.csv", meta, [["valid_7_b_1.nii.gz", 1, -8192, "[4, 4]"]])
    said = [
        ("<image>\nIs there an effusion?<short_answer>", "No", "free_response"),
        ("Describe the lungs.<long_answer>", "The left lung is clear.", "description"),
        (
            "Which lung is ill? (a) the left lung (b) the right lung (c) both<multiple_choice>",
            "(b) the right lung",
            None,
        ),
        ("Write the report.<report_generation>", "Findings: other words.", None),
    ]
    messages = []
    for question, answer, kind in said:
        messages += [{"from": "human", "value": question, "type": kind}, {"from": "gpt", "value": answer}]
    items = [{"id": 1, "image": "train_1_a_1.nii.gz", "conversations": messages}]
    items.append({"id": 2, "image": "train_1_a_1.nii.gz", "conversations": messages[:1]})
    (base / "vqa").mkdir()
    (base / "vqa" / "train_vqa.json").write_text(json.dumps(items))
    return volumes


def decathlon(root: Path) -> dict[str, np.ndarray]:
    base = root / "Task03_Liver"
    masks = {}
    for case in ("liver_0", "liver_131"):
        volume = save(base / "imagesTr" / f"{case}.nii.gz", body(seed=int(case[6:])), LAS)
        mask = np.zeros(volume.shape, np.uint8)
        mask[blob(mask.shape, (9, 9, 6), 5)] = 1
        mask[blob(mask.shape, (9, 9, 6), 2)] = 2
        masks[case] = save(base / "labelsTr" / f"{case}.nii.gz", mask, LAS)
    document = {
        "name": "Liver",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "liver", "2": "cancer"},
        "training": [{"image": f"./imagesTr/{c}.nii.gz", "label": f"./labelsTr/{c}.nii.gz"} for c in masks],
        "test": ["./imagesTs/liver_141.nii.gz"],
    }
    (base / "dataset.json").write_text(json.dumps(document))
    mri = root / "Task04_Hippocampus"
    mri.mkdir()
    (mri / "dataset.json").write_text(json.dumps({**document, "modality": {"0": "MRI"}}))
    return masks
