"""Turn a problem into the words of its error: what is wrong, where, how close, and what to write.

One table of sentences for each subject: files, names and values, writing, devices. `words` picks the sentence of the
problem's kind and fills in its facts. The longer messages, about keys that differ, are made in `mismatch`.
"""

from __future__ import annotations

from collections.abc import Mapping

from smartload.errors.mismatch import CAUSES, ambiguity, mismatch
from smartload.records.problems import Ambiguity, Kind, Mismatch, Problem
from smartload.records.text import first_few, plural, printable

FILES: Mapping[Kind, str] = {
    # Opening. People search for these words, so a file that ends before its time is "truncated", a damaged one "corrupt".
    "shorter": "the file is truncated: {have} bytes are there, {need} are needed. Copy or download it again.",
    "not_found": "there is no file at this path. {beside}.",
    "no_permission": "the file may not be read: {reason}. Check its permissions.",
    "io": "the operating system cannot read it: {reason}.",
    "not_regular": "this is {what}, not a regular file. Save it to disk and give that path.",
    "changed": "the file changed while it was read. Wait until it is written, then load again.",
    "being_written": "the file is being written. Wait until that is done, then load again.",
    "folder": "this is a folder; it holds {names}. Give the path of the file or folder in it that holds the weights.",
    "folder_two": "this folder is ambiguous: it holds more than one set of weights ({names}). Give the path of one of them, such as {first!r}.",
    "folder_unfinished": "this folder holds ranks' files of torch.distributed.checkpoint, but no .metadata, which is written last: "
    "the save did not finish. Take an earlier checkpoint.",
    "keras": "this is a Keras model, not a torch checkpoint. Convert it in Keras and save the weights with torch.save.",
    "folder_shards": "this folder holds shards ({names}), but not the index that names them. Download the .index.json, too.",
    "folder_zero": "this is a folder of DeepSpeed ZeRO, which keeps the weights in shards. Gather them with zero_to_fp32.py, "
    "and give the file that it writes.",
    "zero": "this is one rank's shard of a DeepSpeed ZeRO checkpoint. Gather the shards with zero_to_fp32.py, and give the "
    "file that it writes.",
    "folder_empty": "this folder is empty. Give the path of a checkpoint file.",
    # Anything that no rule of the readers foresaw: the parsers' own IndexError, struct.error and so on.
    "damaged": "the file is corrupt. Copy or download it again.",
    "empty": "the file is empty. Copy or download it again.",
    # What a crash leaves where the file system had given the file its length, but not yet its data.
    "zeros": "the file is corrupt: it begins with nothing but zero bytes, so its data never reached the disk. Copy or download it again.",
    # Files of other kinds, by their first bytes; each with what its owner most likely wants.
    "git_lfs": "this is a git-lfs pointer, not the file it stands for. Run `git lfs pull` where it was cloned.",
    "html": "this is a web page ({start!r}): the download failed. Download the file itself.",
    "xml": "this is an XML file ({start!r}), not a checkpoint. Often it is the error page of a failed download.",
    "json": "this is a JSON file ({start!r}), not a checkpoint. Give the file that holds the weights.",
    "text": "this is a text file ({start!r}), not a checkpoint. Give the file that holds the weights.",
    "compressed": "this is a {packer} archive. Unpack it and give the checkpoint inside.",
    "hdf5": "this is an HDF5 file, as Keras and TensorFlow write it, not a torch checkpoint. "
    "Convert it in Keras and save the weights with torch.save.",
    "gguf": "this is a GGUF file, as llama.cpp reads it, not a torch checkpoint. Take the model's safetensors or .pth release.",
    "onnx": "this is an ONNX graph, not a torch checkpoint. Take the weights from which it was exported.",
    "tflite": "this is a TensorFlow Lite model, not a torch checkpoint.",
    "unknown": "this is no file that torch writes; it begins with the bytes {start}. Give a file that torch.save wrote.",
    "numpy": "this is a single NumPy array, not a state dict. Put it into a dict under the name of its parameter.",
    "tar": "this is a tar archive, but not one of torch. Unpack it and give the checkpoint inside.",
    "torch_tar": "this is a tar archive of torch before 0.2 (2017), which is no longer read. Load it in the release that "
    "wrote it, and save its tensors as arrays with numpy.savez.",
    "tensorflow": "this is a checkpoint of TensorFlow, not of torch. Read it in TensorFlow and save its arrays with numpy.savez.",
    # Safetensors and indexes of shards.
    "json_damaged": "the JSON text in it is corrupt. Copy or download it again.",
    "header_large": "the file is corrupt: its header is said to take {size:,} bytes, far more than names need. Copy or download it again.",
    "header_metadata": "the file is corrupt: the metadata in its header is not text. Copy or download it again.",
    "header_entry": "the file is corrupt: its header does not describe {name!r} as the safetensors format does. Copy or download it again.",
    "header_gap": "the file is corrupt: the bytes of {name!r} do not begin where those of the tensor before it end. Copy or download it again.",
    "header_end": "the file is corrupt: {left} bytes follow its last tensor. Copy or download it again.",
    # Compressed files. Weights are close to noise and compress little; what unpacks to far more was made to
    # fill the memory.
    "gzip_cut": "the gzip archive is truncated. Copy or download it again.",
    "gzip_damaged": "the gzip archive is corrupt. Copy or download it again.",
    "grows": "unpacked it would take {more} or more, from {have}: no weights compress that far. "
    "Unpack it first, and give the file inside.",
    # Shards. An index is somebody else's text: what it names outside of its folder is not opened.
    "index_alone": "this is an index of shards, and an open file does not say in which folder they lie. Give its path.",
    "index_empty": "its weight_map names no files. Copy or download it again.",
    "shard_suffix": "refused: the index names files of another kind than its own: {names}. Download it again.",
    "shard_name": "refused: the index names {name!r}, which is not the name of a file beside it. That file was not opened.",
    "shard_outside": "refused: {name!r} is a link out of the folder. Put the file itself into the folder.",
    "shard_case": "{name!r}, one of the files that it names, lies in its folder as {have!r}. Rename that file: on this "
    "disk, upper and lower case make two names.",
    "shard_missing": "{name!r}, one of the files that it names, is not in its folder. Copy or download that file, too.",
    "shard_lacks": "{name!r} lacks {keys}, which the index says are in it. Copy or download both again.",
    "shard_more": "{name!r} also holds {keys}, which the index does not name. Copy or download both again.",
    # Folders of torch.distributed.checkpoint. Torch reads .metadata with pickle.load, which runs what the file says, so
    # its own converter is named only for the machine that wrote the folder.
    "dcp_damaged": "the .metadata of this torch.distributed.checkpoint folder is corrupt, or not of torch. Copy the folder again, or "
    "make one file of it where it was written: torch.distributed.checkpoint.format_utils.dcp_to_torch_save.",
    "dcp_gap": "the chunks of {name!r} do not make up the tensor. Copy the folder again: a rank's file may be of another save.",
    "dcp_chunk": "a chunk of {name!r} differs from its description in .metadata. Copy the folder again: a rank's file may be of another save.",
    "dcp_file": "this is one rank's file of a torch.distributed.checkpoint folder. Give the path of the folder.",
    # Programs, with weights or without.
    "torchscript": "this is a TorchScript program for the lite interpreter, which names no weights. "
    "Save the state_dict() of the model instead.",
    "torchscript_json": "this is a TorchScript program of torch 1.0 to 1.3, which is no longer read. Load it with "
    "torch.jit.load in the release that wrote it, and save its state_dict().",
    "torch_export": "this is a compiled or exported program without its weights. Save the state_dict() of the model instead.",
    "torch_package": "this is a torch.package archive, not a checkpoint. Save the state_dict() of the model instead.",
    # Zip archives, as torch.save writes them since 1.6: stored, one folder, each name once.
    "zip_other": "this is a zip archive, but not one of torch.save; it holds {names}. Unpack it and give the checkpoint inside.",
    "zip_empty": "this zip archive is empty. Copy or download it again.",
    "zip_split": "this is one part of a zip archive that was split. Put it together and unpack it first.",
    "zip_cut": "the file is truncated: it begins as a zip archive, but ends after {have} bytes, without the archive's directory. "
    "Copy or download it again.",
    "zip_broken": "the zip archive is corrupt: its directory contradicts the file. Copy or download it again.",
    "zip_differs": "the zip archive is corrupt: its directory and the file disagree about {name!r}. Copy or download it again.",
    "zip_packed": "{name!r} in this zip is compressed or encrypted, which torch.save never does. "
    "Unpack the archive and zip it without compression, or take the original file.",
    "zip_roots": "this zip holds more than one folder ({root!r} and {name!r}), which torch.save never writes. "
    "Unpack it and give the checkpoint inside.",
    "zip_twice": "the zip archive is corrupt: it holds {name!r} twice. Copy or download it again.",
    # torch's reader takes two such names for one, and Python's ends a name at the NUL.
    "zip_case": "this zip holds {name!r} and {other!r}, which torch takes for one name, so that it may read either. "
    "Rename one of the two, and write the file again.",
    "zip_nul": "the zip archive is corrupt: there is a NUL byte in the name {name!r}. Copy or download it again.",
    "crc": "the file is corrupt: {name!r} does not have the checksum that was written with it. Copy or download it again.",
    "record_missing": "the file is corrupt: its record {name!r} is missing. Copy or download it again.",
    # Without a unit: bytes in a zip, in safetensors and in npz, elements in the format before torch 1.6.
    "record_size": "the file is corrupt: {name!r} has size {have} in it, but {need} in its description. Copy or download it again.",
    "record_odd": "the file is corrupt: its record {name!r} is not what torch.save writes. Copy or download it again.",
    # The format before torch 1.6, and bare pickles.
    "legacy": "the file is corrupt: it begins as torch wrote it before 1.6, but goes on differently. Copy or download it again.",
    "legacy_version": "the file is corrupt: it names a protocol that no torch release has written. Copy or download it again.",
    "pickle": "the pickle in it is corrupt at byte {at}. Copy or download the file again.",
    "pickle_short": "the pickle in it is truncated: it ends at byte {at}. Copy or download the file again.",
    "pickle_long": "the pickle in it has more than {limit:,} steps, far more than weights need. Save the state_dict() alone.",
    "pickle_grows": "the pickle in it would take far more memory than it has bytes. Save the state_dict() alone.",
    "plain_large": "this pickle was not written by torch.save and takes more than {limit}, all of which would have to be read at once. "
    "Load it where it was written, and save the state dict with torch.save.",
    "pickle_more": "{left} bytes follow the pickle in it. Put the state dict into a file of its own.",
    "pickle_ids": "this pickle refers to data that is not in it. Take a file that torch.save wrote.",
    "pickle_large": "the pickle in it takes {size:,} bytes, far more than names need. Save the state_dict() alone.",
    "pickle_protocol": "it is written in pickle protocol {protocol}, which smartload does not know. "
    "Save it with pickle_protocol=2.",
    # What a pickle says of tensors and storages.
    "storage_id": "the file is corrupt: the description of a storage in it is not what torch.save writes. Copy or download it again.",
    "storage_type": "it holds a storage of type {name}, which smartload does not know. Save the state_dict() with ordinary tensors.",
    "storage_twice": "the file is corrupt: it describes storage {name!r} twice and differently. Copy or download it again.",
    "tensor": "the file is corrupt: the description of a tensor in it is not what torch.save writes. Copy or download it again.",
    "tensor_outside": "the file is corrupt: a tensor in it needs {need} bytes of a storage that has {have}. Copy or download it again.",
    # What is at the top of a file, where it is no state dict.
    "path_twice": "the file is ambiguous: two of its dicts have the same dotted path {name!r}. Rename a key in one of them, so that each has a path of its own.",
    "key_twice": "the file is ambiguous: it gives the key {name!r} twice. Save the state dict again.",
    "odd_keys": "its keys are of type {type}, not str (the first: {key}). Save a state dict: model.state_dict().",
    "optimizer": "this is an optimizer's state ({tensors} tensors), not a model's. "
    "Load it with optimizer.load_state_dict, and give the model's file here.",
    "bare_tensor": "this is a single tensor, not a state dict. Put it into a dict under the name of its parameter.",
    "a_list": "at its top is a list ({what}), not a state dict; lists have no names. Save a dict of names.",
    "out_of_reach": "at its top is {what}, not a state dict: its {tensors} tensors have no keys. "
    "Save a state dict: model.state_dict().",
    "no_weights": "it holds no weights: at its top is {what}. Give the file that model.state_dict() was saved to.",
    "names_long": "its names take more than {limit}, far more than the names of any model. Save the state_dict() alone.",
    "names_deep": "the dots in its names make far more modules than those of any model. Save the state_dict() alone.",
    "tangled": "its values refer to each other more than {limit:,} times, far more than weights need. "
    "Save the state_dict() alone.",
    "module_itself": "the module in it contains itself. Save its state_dict() instead.",
    "module_large": "the module in it is deeper, or has more names, than any that torch can load. "
    "Save its state_dict() instead.",
    # What a pickle tries to do beside building plain data. The machine that reads it can do none of it.
    "unsafe_build": "refused: it tries to change {name}, which no honest checkpoint does. Nothing of it was run.",
    "unsafe_item": "refused: it tries to write into {name}, which no honest checkpoint does. Nothing of it was run.",
    "unsafe_storage": "refused: it puts something else where a storage must be, which no honest checkpoint does. "
    "Nothing of it was run.",
}
"""One sentence for each kind of problem with a file.

`{name}` stands for a fact of the Problem; the path is put before the sentence.
"""

NAMES: Mapping[Kind, str] = {
    "select": "there is no {select!r} in the file. It holds: {parts}. Write one of these as select=...",
    "select-flat": "there is no {select!r} in the file, and no part in it that could be selected. Leave select out.",
    "rename": "the rename rule {old!r} matched no key of the file; its keys look like {examples}.",
    "pattern": "the {argument} pattern {pattern!r} matched no {whose}; the keys look like {examples}.",
    "twice": "{first} and {second} would get the same name. Give each a name of its own in rename=..., or select one part.",
    "dotted_twice": "{name!r} is ambiguous: one dict has a key with a dot in it, and another dict has the rest of it as a key. "
    "Rename one of the two where they were saved, or select another part.",
    "overlap": "{what} of {model} share a part of their memory, and the file has two values for it. Give each tensor "
    "memory of its own, or load with assign=True.",
    "nested": "its names fit {model} in more ways than can be tried. Name the part that is meant: select=...",
    "cast": "{key} is {source} in the file and {target} in the model, which cannot hold the value {value}. "
    "{convert}, or repair the file.",
    "cast-kind": "{key} is {source} in the file and {target} in the model; the imaginary part would be lost. "
    "Make that tensor complex in the model, or save its real part alone.",
    "dtype": "the file holds tensors of dtype {dtype}, which torch {torch} does not know. Update torch.",
    "memory": "a tensor in the file takes {need:,} bytes of memory, which could not be allocated. Free some, or leave that tensor out.",
    "grown": "{key!r} takes {need:,} bytes of memory and {have:,} in the file, and the lazy module would take that shape. "
    "Give the module its shape first, by a forward pass, then load.",
    "no-memory": "there was not enough memory ({error}). Free some, or use a machine that has more; smart_load takes less of it "
    "with undo=False, which keeps no copy of the model's values.",
    "no-descriptors": "there are too many open files, and the process may open no more ({error}). Close some, or raise the limit: ulimit -n.",
    "too-deep": "more calls were nested than Python allows ({error}). Where modules are nested so deeply, or the calls around "
    "this one, raise the limit first: sys.setrecursionlimit(10_000).",
    "module-loop": "the module {name!r} contains itself, so that its keys never end. Take it out of itself, then load.",
    "value": "{key} is {what}, not a tensor that can be loaded.",
    "strict": "torch's own load_state_dict(strict=True) refused; the model is as it was. It said: {torch}",
    "model-code": "loading code of {model} raised {error}. The model is as it was.",
    "half-loaded": "the load stopped ({cause}) while tensors were written, and no copy of the old values was kept (undo "
    "was off, or the model is larger than 256 MiB). These may hold a mixture of old and new values: {keys}. Load again before using the model; undo=True keeps a copy.",
    "strict-argument": "strict can only be True: otherwise missing weights stay as they were initialised, and nobody is told. Name what may be missing "
    "or unexpected: allow_missing=['head.*'], allow_unexpected=['aux.*'].",
}
"""One sentence for each kind of problem with names, values and calls."""

WRITING: Mapping[Kind, str] = {
    "own-source": "{to} is the checkpoint itself, or a file of it. Write to another path, then rename it if you like.",
    "inside-source": "{to} lies in the folder that is read. Write to another folder.",
    "no-folder": "{to} could not be written: there is no folder {folder}. Make it first, or write to another one.",
    "no-file": "{to} is {what}, not a regular file. Write to another path.",
    "link-loop": "{to} could not be written: {link} is a link that leads back to itself. Remove it, or write to another path.",
    "read-only": "{to} could not be written: it is there, and you may not write to it. Change its permissions, or write to another path.",
    "hard-links": "{to} is one of {count} names of one file (hard links), and only this name would get the new file. "
    "Remove this name first if that is meant; else write to another path, and copy that file over this one.",
    "in-use": "{to} could not be replaced: a program has it open, or it may not be written. Nothing was changed there. "
    "A tensor of torch.load(mmap=True) or of safetensors keeps its file open, too: delete it, or write to another path.",
    "not-written": "{to} could not be written: {reason}. Nothing was changed there.",
    "read-back": "what was written for {to} reads back differently. It was removed; nothing was changed there. Try again, or use another disk.",
    "extra-states": "{keys}: these extra states are not tensors, and safetensors holds nothing else. Write a .pth file.",
    "header-dtype": "{key} is {dtype}, which safetensors cannot hold. Write a .pth file.",
    "cast-dtype": "{key} is {source} and holds the value {value}, which {target} cannot hold. Choose a wider dtype, or leave dtype out.",
    "repeats": "with every tensor by itself it would take {more}, from {have} in which elements repeat, or tensors have several names; "
    "the largest is {key} ({need}). Leave that out with select=..., or save it without expand(). A .pth holds tensors that are tied once.",
}
"""One sentence for each kind of problem with a file that is to be written."""

PLACES: Mapping[Kind, str] = {
    "absent-device": "device={device!r} was asked for, but {there}. The checkpoint itself loads anywhere: leave device "
    "out to load into the model where it is ({home}).",
    "no-such-device": "device={device!r} is not a device that torch knows: {torch}",
    "meta-device": "the meta device holds no data. Build the model there, and pass the device that its tensors shall be on.",
    "device-dtype": "{device} holds no {dtype}, the dtype of {names} in the {owner}. {convert}.",
    "data-parallel": "device={device!r}, but {where} is a DataParallel over {ids}, which needs its parameters on {first}. "
    "Leave device out, or use the network without DataParallel on another device.",
    "several-devices": "device={device} names several devices, but the model is not a DataParallel ({model}). Pass one "
    "device, or wrap it: torch.nn.DataParallel(model, device_ids={device}), then smart_load(that, path).",
    "other-devices": "device={device}, but this DataParallel was built for {ids}. Leave device out, or wrap the network anew.",
    "bound": "device={device!r} cannot move this model: it is {how}. Leave device out; every tensor is loaded where "
    "its parameter is.",
    "held-on-to": "assign=True would replace tensors inside a {how}. Leave assign out, or load before wrapping.",
    "meta-buffers": "non-persistent buffers on the meta device: {names}. No checkpoint holds them. Build the model with "
    "real buffers, or fill them after model.to_empty(device=...), then load.",
    "inference": "{names} were made in inference mode, and nothing may write to them outside of it. Call smart_load inside torch.inference_mode(), or build the model outside.",
    "move-failed": "{model} could not be brought to its device: {error}. The model is as it was. Free memory there, or choose another device.",
    "meta-missing": "on the meta device and not in the file: {names}. There is no value to keep. Build the model on a "
    "real device, or give a file that holds them.",
    "fake-mode": "in the mode that is active here, torch makes a {kind} in the place of every tensor. Call smart_load outside of it.",
    "fake": "fake tensors, which hold no values: {names}. Build the model outside of FakeTensorMode, then load.",
    "meta-values": "on the meta device in the state dict, too, so that it holds no values for them: {names}. Give a state dict with values. A "
    "model that is on meta as a whole takes it where device is left out, and stays there.",
    "offloaded": "offloaded by accelerate (meta tensors with hooks): {names}. Load the weights first, then dispatch.",
}
"""One sentence for each kind of problem with devices."""


SENTENCES: Mapping[Kind, str] = {**FILES, **NAMES, **WRITING, **PLACES, **CAUSES}


def words(problem: Problem | Mismatch | Ambiguity) -> str:
    """Make the message for a problem: what, where, how close, what to write.

    >>> words(Problem("shorter", "best.pth", {"have": 10, "need": 20}))
    'best.pth: the file is truncated: 10 bytes are there, 20 are needed. Copy or download it again.'
    """
    if isinstance(problem, Mismatch):
        return mismatch(problem)
    if isinstance(problem, Ambiguity):
        return ambiguity(problem)
    try:
        text = SENTENCES[problem.kind].format(**{name: _fact(value) for name, value in _completed(problem).items()})
    except Exception:  # noqa: BLE001 - a sentence that is missing or wrong must not hide the refusal itself
        text = without_a_sentence(problem)
    return f"{problem.path}: {text}" if problem.path else text


def without_a_sentence(problem: Problem) -> str:
    """Name kind and facts of a problem that has no sentence, or not the facts for it.

    >>> without_a_sentence(Problem("shorter", "best.pth", {"have": 10}))
    'refused (shorter: have=10).'
    """
    facts = ", ".join(f"{printable(name)}={printable(repr(value))}" for name, value in problem.facts.items())
    return f"refused ({problem.kind}{': ' if facts else ''}{facts})."


# No real size is larger, and no integer in a tensor. A hostile pickle holds integers of any length, and Python refuses to
# print very long ones.
_LARGEST = 2**64 - 1
# model.to(dtype) is proposed for these only: it leaves integers as they are, and a whole model in float8 is no use.
_FLOATS = ("float16", "bfloat16", "float32", "float64")
# Characters of torch's own message that are repeated: it lists every key, and a model may have thousands.
_LONGEST_ERROR = 1500


def _fact(value: object) -> object:
    """Shorten a fact for print: a list of names to its first few, an integer to what is plausible."""
    if isinstance(value, int):
        return min(value, _LARGEST)
    return first_few(map(str, value)) if isinstance(value, (tuple, list)) else value


def _completed(problem: Problem) -> dict[str, object]:
    """Add to the facts of a problem those that its sentence needs and that follow from them."""
    facts = dict(problem.facts)
    if problem.kind == "absent-device":
        facts["there"] = _why_absent(facts)
    elif problem.kind == "data-parallel":
        facts["where"] = f"the module {facts['where']!r}" if facts["where"] else "the model"
    elif problem.kind in ("several-devices", "other-devices"):
        # As text, or _fact would fold the list into its first few: it is to be copied into the next call.
        facts |= {name: str(facts[name]) for name in ("device", "ids") if name in facts}
    elif problem.kind == "cast":
        both = facts["source"] in _FLOATS and facts["target"] in _FLOATS
        dtype = f"torch.{facts['source']}"
        facts["convert"] = (
            f"Convert the model first: model.to({dtype})" if both else f"Make it {dtype} in the model first"
        )
    elif problem.kind == "device-dtype":
        facts["owner"] = "file" if facts.get("in_file") else "model"
        if facts.get("in_file"):
            facts["convert"] = "Leave assign out, and the model keeps its own dtypes"
        elif facts["dtype"] == "torch.float64":
            facts["convert"] = "Convert the model first: model.float()"
        else:
            facts["convert"] = "Give them another dtype in the model first"
    elif problem.kind == "strict":
        facts["torch"] = str(facts["torch"])[:_LONGEST_ERROR]
    return facts


def _why_absent(facts: Mapping[str, object]) -> str:
    """Say why a device is not there: fewer devices, none, or a torch without CUDA."""
    kind, count = str(facts["type"]), int(str(facts["count"]))
    if count:
        there = f"{kind}:0" if count == 1 else f"{kind}:0 to {kind}:{count - 1}"
        return f"this machine has {plural(count, f'{kind} device')} ({there})"
    if kind == "cuda":
        why = "finds no driver or no device" if facts["built"] else "is a build without CUDA"
        return f"torch.cuda.is_available() is False (torch {facts['torch']} {why})"
    return f"torch {facts['torch']} finds no {kind} device on this machine"
