"""Packed activations: the bytes, the coder, and the models that hold them."""

from __future__ import annotations

from . import Part

FILES = "round_trip frame coder bound allocation pipeline compatibility aliases user_methods adapters".split()
PART = Part("storage", "dqa_plugins/storage", *(f"storage/test_{name}.py" for name in FILES))
add = PART.add

add("the batch's scale, not the sample's", "grids.py", '1 if quantizer.method.source == "static" else p.shape[0]', "1")
add(
    "vectors of another channel",
    "grids.py",
    "vector.detach().to(like.device).reshape(1, -1, 1)",
    "vector.detach().flip(0).to(like.device).reshape(1, -1, 1)",
)
add("rows of axis 1 always", "coder/codec.py", "front = x.movedim(axis, 1)", "front = x")
add(
    "channels come back in another place",
    "coder/codec.py",
    "return x.reshape(front).movedim(1, axis).contiguous()",
    "return x.reshape(shape)",
)
add("codes of 16 bits are signed", "coder/codec.py", "return whole if book.signed else whole & 0xFFFF", "return whole")
add(
    "steps of n bits",
    "coder/codec.py",
    "* power_of_two(-book.extra_bits).unsqueeze(0)",
    "* power_of_two(0 * book.extra_bits).unsqueeze(0)",
)
add(
    "results do not saturate",
    "coder/codec.py",
    "    values = narrow(values, frame.dtype)",
    "    values = values.to(frame.dtype)",
)
add(
    "outliers are not put back",
    "coder/codec.py",
    "if parts.positions is not None and parts.values is not None:",
    "if False:",
)
add("NaN is packed", "coder/codec.py", "    if not torch.isfinite(x).all():", "    if False:")
add(
    "the checksum is not checked",
    "format/frame.py",
    "if _checksum([view[:_CRC_AT], view[HEADER.size :]]) != crc:",
    "if False:",
    "storage/test_frame.py",
)
add(
    "another version is read", "format/frame.py", "    if version != VERSION:", "    if False:", "storage/test_frame.py"
)
add(
    "bytes that follow are taken",
    "format/frame.py",
    "if len(view) != start + codebook_bytes + data_bytes:",
    "if len(view) < start + codebook_bytes + data_bytes:",
    "storage/test_frame.py",
)
add(
    "a small frame may ask for any memory",
    "format/frame.py",
    "if numel > MAX_SYMBOLS_PER_BYTE * data_bytes or strides > MAX_PRODUCT:",
    "if False:",
    "storage/test_frame.py",
)
add(
    "side information is not counted",
    "format/frame.py",
    "return overhead(len(self.shape), self.codebook.keeps_outliers) + len(self.data)",
    "return len(self.data)",
)
add(
    "chunks may overlap",
    "format/data.py",
    "    if int(sizes.sum()) != data.size - head:",
    "    if False:",
    "storage/test_frame.py",
)
add(
    "chunks of any size",
    "format/data.py",
    "or (sizes > fixed).any() or (sizes < layout.least_sizes()).any()",
    "",
    "storage/test_frame.py",
)
add("another layer's codebook is taken", "tables.py", "    if wrong:\n        raise", "    if False:\n        raise")
add(
    "predictions do not travel",
    "model/convert.py",
    '        node.kwargs = {"prediction": origin.args[1]}',
    "        pass",
    "storage/test_adapters.py",
)
add("an observing quantizer packs", "tables.py", '    if quantizer.state == "observe":', "    if False:")
add(
    "a grid of eq. 12 whatever the method",
    "tables.py",
    "        if same_grid(grid, Grid.affine",
    "        if True or same_grid(grid, Grid.affine",
)
add(
    "incompressible tensors grow",
    "packing.py",
    "        if len(data) > plain.fixed_sizes().sum() + sum(p.nbytes for p in stored):",
    "        if False:",
)
add(
    "another number of channels is packed",
    "packing.py",
    "    if axis and 0 not in shape and shape[axis] != channels:",
    "    if False:",
)
add(
    "a value of one layer is long-lived",
    "model/convert.py",
    "late = late_reads(traced, min_lifetime,",
    "late = late_reads(traced, 0,",
    "storage/test_pipeline.py",
)
add(
    "prepare changes the model",
    "model/convert.py",
    "traced = trace(copy.deepcopy(model))",
    "traced = trace(model)",
    "storage/test_pipeline.py",
)
add(
    "skip is ignored",
    "model/convert.py",
    "if names[node] not in skip and not _only_predicts",
    "if not _only_predicts",
    "storage/test_pipeline.py",
)
add(
    "late readers read the float value",
    "model/convert.py",
    "            user.replace_input_with(node, unpacked)\n",
    "            pass\n",
    "storage/test_pipeline.py",
)
add(
    "the adapter's quantizer is replaced",
    "model/convert.py",
    "quantizer = existing or ActivationQuantizer(",
    "quantizer = ActivationQuantizer(",
    "storage/test_adapters.py",
)
