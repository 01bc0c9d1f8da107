"""The words of every refusal: what, where, how close, what to write. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from smartload.errors.mismatch import CAUSES, ambiguity, mismatch
from smartload.records.problems import Ambiguity, Kind, Mismatch, Problem
from smartload.records.text import first_few, plural, printable

FILES: Mapping[Kind, str] = {
    "shorter": "the file ends too early: {have} bytes are there, {need} are needed. Copy or download it again.",
    "not_found": "there is no file at this path. {beside}.",
    "no_permission": "the file may not be read: {reason}. Check its permissions.",
    "io": "the operating system cannot read it: {reason}.",
    "not_regular": "this is {what}, not a regular file. Save it to disk and give that path.",
    "changed": "the file changed while it was read. Wait until it is written, then load again.",
    "being_written": "the file is being written. Wait until that is done, then load again.",
    "folder": "this is a folder; it holds {names}. Give the path of the file or folder in it that holds the weights.",
    "folder_two": "this folder holds more than one set of weights: {names}. Give the path of one of them, such as {first!r}.",
    "folder_unfinished": "this folder holds ranks' files of torch.distributed.checkpoint, but no .metadata, which is written last: "
    "the save did not finish. Take the checkpoint before it.",
    "keras": "this is a Keras model, not a torch checkpoint. Convert it in Keras and save the weights with torch.save.",
    "folder_shards": "this folder holds shards ({names}), but not the index that names them. Download the .index.json, too.",
    "folder_zero": "this is a folder of DeepSpeed ZeRO, which keeps the weights in pieces. Gather them with zero_to_fp32.py, "
    "and give the file that it writes.",
    "zero": "this is one rank's piece of a DeepSpeed ZeRO checkpoint. Gather the pieces with zero_to_fp32.py, and give the "
    "file that it writes.",
    "folder_empty": "this is a folder, and nothing is in it. Give the path of a checkpoint file.",
    "damaged": "the file is damaged. Copy or download it again.",
    "empty": "the file is empty. Copy or download it again.",
    "zeros": "the file begins with nothing but zero bytes: its data never reached the disk. Copy or download it again.",
    "git_lfs": "this is a git-lfs pointer, not the file it stands for. Run `git lfs pull` where it was cloned.",
    "html": "this is a web page ({start!r}): the download failed. Download the file itself.",
    "xml": "this is an XML file ({start!r}), not a checkpoint. Often it is the error page of a failed download.",
    "json": "this is a JSON file ({start!r}), not a checkpoint. Give the file that holds the weights.",
    "text": "this is a text file ({start!r}), not a checkpoint. Give the file that holds the weights.",
    "compressed": "this is a {packer} archive. Unpack it and give the checkpoint inside.",
    "hdf5": "this is an HDF5 file, as Keras and TensorFlow write it, not a torch checkpoint. "
    "Convert it in Keras and save the weights with torch.save.",
    "gguf": "this is a GGUF file, as llama.cpp reads it, not a torch checkpoint. Take the safetensors or .pth release of it.",
    "onnx": "this is an ONNX graph, not a torch checkpoint. Take the weights from which it was exported.",
    "tflite": "this is a TensorFlow Lite model, not a torch checkpoint.",
    "unknown": "this is no file that torch writes; it begins with the bytes {start}. Give a file that torch.save wrote.",
    "numpy": "this is a single NumPy array, not a state dict. Put it into a dict under the name of its parameter.",
    "tar": "this is a tar archive, but not one of torch. Unpack it and give the checkpoint inside.",
    "torch_tar": "this is a tar archive of torch before 0.2 (2017), which is no longer read. Load it in the release that "
    "wrote it, and save its tensors as arrays with numpy.savez.",
    "tensorflow": "this is a checkpoint of TensorFlow, not of torch. Read it in TensorFlow and save its arrays with numpy.savez.",
    "json_damaged": "the JSON text in it is damaged. Copy or download it again.",
    "header_large": "its header is said to take {size:,} bytes, far more than names need. Copy or download it again.",
    "header_metadata": "the metadata in its header is not text. Copy or download it again.",
    "header_entry": "its header describes {name!r} otherwise than the safetensors format does. Copy or download it again.",
    "header_gap": "the bytes of {name!r} do not begin where those of the tensor before it end. Copy or download it again.",
    "header_end": "{left} bytes follow behind its last tensor, which no writer puts there. Copy or download it again.",
    "gzip_cut": "the gzip archive ends too early. Copy or download it again.",
    "gzip_damaged": "the gzip archive is damaged. Copy or download it again.",
    "grows": "unpacked it would take {more} or more, instead of {have}: far more than weights shrink by. "
    "Unpack it first, and give the file inside.",
    "index_alone": "this is an index of shards, and an open file does not say in which folder they lie. Give its path.",
    "index_empty": "its weight_map names no files. Copy or download it again.",
    "shard_suffix": "refused: the index names files of another kind than its own: {names}. Download it again.",
    "shard_name": "refused: the index names {name!r}, which is no plain name of a file beside it. Nothing of that was opened.",
    "shard_outside": "refused: {name!r} is a link out of the folder. Put the file itself into the folder.",
    "shard_missing": "{name!r}, one of the files that it names, is not in its folder. Copy or download that file, too.",
    "shard_lacks": "{name!r} lacks {keys}, which should be in it. Copy or download both again.",
    "shard_more": "{name!r} also holds {keys}, of which the index says nothing. Copy or download both again.",
    "dcp_damaged": "the .metadata of this torch.distributed.checkpoint folder is not as torch writes it. Copy the folder again, or "
    "make one file of it with torch.distributed.checkpoint.format_utils.dcp_to_torch_save.",
    "dcp_gap": "the chunks of {name!r} do not make up the tensor. Copy the folder again: a rank's file may be of another save.",
    "dcp_chunk": "a chunk of {name!r} is not what .metadata says of it. Copy the folder again: a rank's file may be of another save.",
    "dcp_file": "this is one rank's file of a torch.distributed.checkpoint folder. Give the path of the folder.",
    "torchscript": "this is a TorchScript program for the lite interpreter, which names no weights. "
    "Save the state_dict() of the model instead.",
    "torchscript_json": "this is a TorchScript program of torch 1.0 to 1.3, which is no longer read. Load it with "
    "torch.jit.load in the release that wrote it, and save its state_dict().",
    "torch_export": "this is a compiled or exported program without its weights. Save the state_dict() of the model instead.",
    "torch_package": "this is a torch.package archive, not a checkpoint. Save the state_dict() of the model instead.",
    "zip_other": "this is a zip archive, but not one of torch.save; it holds {names}. Unpack it and give the checkpoint inside.",
    "zip_empty": "this is a zip archive with nothing in it. Copy or download it again.",
    "zip_split": "this is one part of a zip archive that was split. Put it together and unpack it first.",
    "zip_cut": "the file begins as a zip archive, but its end is missing: it stops after {have} bytes. "
    "Copy or download it again.",
    "zip_broken": "the directory of this zip archive contradicts the file. Copy or download it again.",
    "zip_differs": "the zip directory and the file disagree about {name!r}. Copy or download it again.",
    "zip_packed": "{name!r} in this zip is compressed or encrypted, which torch.save never does. "
    "Unpack the archive and zip it without compression, or take the original file.",
    "zip_roots": "this zip holds more than one folder ({root!r} and {name!r}), which torch.save never writes. "
    "Unpack it and give the checkpoint inside.",
    "zip_twice": "this zip holds {name!r} twice, which torch.save never writes. Copy or download it again.",
    "crc": "{name!r} does not have the checksum that was written with it. Copy or download the file again.",
    "record_missing": "the bytes of storage {name!r} are not in the file. Copy or download it again.",
    "record_size": "storage {name!r} takes {have} in the file but {need} by its description. Copy or download it again.",
    "record_odd": "{name!r} in this file is not what torch.save writes. Copy or download it again.",
    "legacy": "the file begins as torch wrote it before 1.6, but goes on differently. Copy or download it again.",
    "legacy_version": "the file is of a protocol that no torch release has written. Copy or download it again.",
    "pickle": "the pickle in it is damaged at byte {at}. Copy or download the file again.",
    "pickle_short": "the pickle in it ends too early, at byte {at}. Copy or download the file again.",
    "pickle_long": "the pickle in it has more than {limit:,} steps, far more than weights need. Save the state_dict() alone.",
    "plain_large": "this pickle was not written by torch.save and takes more than {limit}, which would have to be read whole. "
    "Load it where it was written, and save the state dict with torch.save.",
    "pickle_more": "behind the pickle in it {left} bytes follow. Put the state dict into a file of its own.",
    "pickle_ids": "this pickle refers to data that is not in it. Take a file that torch.save wrote.",
    "pickle_large": "the pickle in it takes {size:,} bytes, far more than names need. Save the state_dict() alone.",
    "pickle_protocol": "it is written in pickle protocol {protocol}, which this smartload does not know. "
    "Save it with pickle_protocol=2.",
    "storage_id": "the description of a storage in it is not what torch.save writes. Copy or download it again.",
    "storage_type": "it holds a storage of type {name}, which this smartload does not know.",
    "storage_twice": "it describes storage {name!r} twice and differently. Copy or download it again.",
    "tensor": "the description of a tensor in it is not what torch.save writes. Copy or download it again.",
    "tensor_outside": "a tensor in it reaches {need} bytes into a storage of {have}. Copy or download it again.",
    "path_twice": "two of its dicts have the same dotted path {name!r}. Rename a key in one of them, so that each has a path of its own.",
    "key_twice": "it gives the key {name!r} twice. Save the state dict anew.",
    "odd_keys": "its keys are not names but of type {type} (the first: {key}). Save a state dict: model.state_dict().",
    "optimizer": "this is an optimizer's state ({tensors} tensors), not a model's. "
    "Load it with optimizer.load_state_dict, and give the model's file here.",
    "bare_tensor": "this is a single tensor, not a state dict. Put it into a dict under the name of its parameter.",
    "a_list": "at its top is a list ({what}), not a state dict; lists have no names. Save a dict of names.",
    "out_of_reach": "at its top is {what}, not a state dict: its {tensors} tensors have no names that a model would know. "
    "Save a state dict: model.state_dict().",
    "no_weights": "there are no weights in it: at its top is {what}. Give the file that model.state_dict() was saved to.",
    "names_long": "its names take more than {limit}, far more than the names of any model. Save the state_dict() alone.",
    "tangled": "its values refer to each other more than {limit:,} times, far more than weights need. "
    "Save the state_dict() alone.",
    "module_itself": "the module in it contains itself. Save its state_dict() instead.",
    "module_large": "the module in it is deeper, or has more than {limit:,} names, than any that torch can load. "
    "Save its state_dict() instead.",
    "unsafe_build": "refused: it tries to change {name}, which no honest checkpoint does. Nothing of it was run.",
    "unsafe_item": "refused: it tries to write into {name}, which no honest checkpoint does. Nothing of it was run.",
    "unsafe_storage": "refused: it puts something else where a storage must be, which no honest checkpoint does. "
    "Nothing of it was run.",
}
"""One sentence for each kind of file problem; `{name}` stands for a fact of the Problem, `{path}` goes before it."""


NAMES: Mapping[Kind, str] = {
    "select": "there is no {select!r} in the file. It holds: {parts}. Write one of these as select=...",
    "select-flat": "there is no {select!r} in the file, and no part in it that could be selected. Leave select out.",
    "rename": "the rename rule {old!r} matched no key of the file; its keys look like {examples}.",
    "pattern": "the {argument} pattern {pattern!r} matched no {whose}; the keys look like {examples}.",
    "twice": "{first} and {second} would get the same name. Give each a name of its own in rename=..., or select one part.",
    "nested": "its names fit {model} in more ways than can be looked at. Name the part that is meant in select=....",
    "cast": "{key} is {source} in the file and {target} in the model, which cannot hold the value {value}. "
    "Convert the model first (model.to({source_dtype}) or that one module), or repair the file.",
    "cast-kind": "{key} is {source} in the file and {target} in the model; the imaginary part would be lost. "
    "Convert the model to a complex dtype, or the file to its real part.",
    "dtype": "the file holds tensors of dtype {dtype}, which torch {torch} does not know. Update torch.",
    "memory": "a tensor in the file takes {need:,} bytes of memory, which cannot be had. Free some, or leave that tensor out.",
    "value": "{key} is {what}, not a tensor that can be loaded.",
    "strict": "torch's own strict load refused; the model is as it was. It said: {torch}",
    "model-code": "loading code of {model} raised {error}. The model is as it was.",
    "half-loaded": "the load stopped ({cause}) while tensors were written, and no copy of the old values was kept (undo "
    "was off, or the model is larger than 256 MiB). These may hold a mixture: {keys}. Load again before using the model; undo=True keeps a copy.",
    "strict-argument": "strict can only be True: otherwise a network runs on whatever weights were missing. Name what may be missing "
    "or left out: allow_missing=['head.*'], allow_unexpected=['aux.*'].",
}
"""The words for problems with names, values and calls."""

WRITING: Mapping[Kind, str] = {
    "no-safetensors": 'a .safetensors file is written by the package of that name. Install it: pip install "torch-smartload[safetensors]".',
    "own-source": "{to} is the checkpoint itself, or a file of it. Write to another path, then rename it if you like.",
    "inside-source": "{to} lies in the folder that is read. Write to another folder.",
    "no-file": "{to} is there, and is not a regular file. Write to another path.",
    "not-written": "{to} could not be written: {reason}. Nothing was changed there.",
    "read-back": "what was written for {to} does not read back as what was meant. It was removed; nothing was changed there. Try again, or another disk.",
    "extra-states": "{keys}: extra states that are no tensors, which safetensors cannot hold. Write a .pth file.",
    "cast-dtype": "{key} is {source} and holds the value {value}, which {target} cannot hold. Take a wider dtype, or leave dtype out.",
}
"""The words for problems with a file that is to be written."""

PLACES: Mapping[Kind, str] = {
    "absent-device": "device={device!r} was asked for, but {there}. The checkpoint itself loads anywhere: leave device "
    "out to load into the model where it is ({home}).",
    "no-such-device": "device={device!r} is not a device that torch knows: {torch}",
    "meta-device": "device='meta' holds no data; build the model there and pass the device that it should end on.",
    "data-parallel": "device={device!r}, but {where} is a DataParallel over {ids}, which needs its parameters on {first}. "
    "Leave device out, or load into {inner} before wrapping.",
    "several-devices": "device={device} names several devices, but the model is not a DataParallel ({model}). Pass one "
    "device, or wrap it: torch.nn.DataParallel(model, device_ids={device}), then smart_load(that, path).",
    "other-devices": "device={device}, but this DataParallel was built for {ids}. Leave device out, or wrap the network anew.",
    "bound": "device={device!r} cannot move this model: it is {how}. Leave device out; every tensor is loaded to where "
    "its parameter is.",
    "held-on-to": "assign=True would replace tensors inside a {how}. Leave assign out, or load before wrapping.",
    "meta-buffers": "non-persistent buffers on the meta device: {names}. No checkpoint holds them. Build the model with "
    "real buffers, or fill them after model.to_empty(device=...), then load.",
    "inference": "{names} were made in inference mode, and nothing may write to them outside of it. Call smart_load inside torch.inference_mode(), or build the model outside.",
    "move-failed": "{model} could not be brought to its device: {error}. The model is as it was. Free memory there, or choose another device.",
    "meta-missing": "on the meta device and not in the file: {names}. There is no value to keep. Build the model on a "
    "real device, or give a file that holds them.",
    "offloaded": "offloaded by accelerate (meta tensors with hooks): {names}. Load the weights first, then dispatch.",
}
"""The words for problems with devices."""


SENTENCES: Mapping[Kind, str] = {**FILES, **NAMES, **WRITING, **PLACES, **CAUSES}


def words(problem: Problem | Mismatch | Ambiguity) -> str:
    """Give the message for a problem: what, where, how close, what to write."""
    if isinstance(problem, Mismatch):
        return mismatch(problem)
    if isinstance(problem, Ambiguity):
        return ambiguity(problem)
    try:
        text = SENTENCES[problem.kind].format(**{name: _fact(value) for name, value in _completed(problem).items()})
    except Exception:  # noqa: BLE001 - a sentence that is missing or wrong must not take the refusal's place
        text = without_a_sentence(problem)
    return f"{problem.path}: {text}" if problem.path else text


def without_a_sentence(problem: Problem) -> str:
    """Give kind and facts of a problem that has no sentence, or not the facts for it."""
    facts = ", ".join(f"{printable(name)}={printable(repr(value))}" for name, value in problem.facts.items())
    return f"refused ({problem.kind}{': ' if facts else ''}{facts})."


_LARGEST = 10**18
"""Nothing that is real is larger; a hostile number may have a thousand digits."""


def _fact(value: object) -> object:
    if isinstance(value, int):
        return min(value, _LARGEST)
    return first_few(map(str, value)) if isinstance(value, (tuple, list)) else value


def _completed(problem: Problem) -> dict[str, object]:
    """The facts, with those that follow from them."""
    facts = dict(problem.facts)
    if problem.kind == "absent-device":
        facts["there"] = _absence(facts)
    elif problem.kind == "data-parallel":
        facts["inner"] = f"model.{facts['where']}.module" if facts["where"] else "model.module"
        facts["where"] = f"the module {facts['where']!r}" if facts["where"] else "the model"
    elif problem.kind in ("several-devices", "other-devices"):
        facts |= {name: str(facts[name]) for name in ("device", "ids") if name in facts}
    elif problem.kind == "cast":
        facts["source_dtype"] = f"torch.{facts['source']}"
    elif problem.kind == "strict":
        facts["torch"] = str(facts["torch"])[:1500]
    return facts


def _absence(facts: Mapping[str, object]) -> str:
    """Why a device is not there."""
    kind, count = str(facts["type"]), int(str(facts["count"]))
    if count:
        there = f"{kind}:0" if count == 1 else f"{kind}:0 to {kind}:{count - 1}"
        return f"this machine has {plural(count, f'{kind} device')} ({there})"
    if kind == "cuda":
        why = "finds no driver or no device" if facts["built"] else "is a build without CUDA"
        return f"torch.cuda.is_available() is False (torch {facts['torch']} {why})"
    return f"torch {facts['torch']} finds no {kind} device on this machine"
