"""Which tests hold a module, and which mutants are none."""

HOLDS = {
    "convert/card.py": "convert/card convert/prune",
    "convert/checksums.py": "convert/parsers convert/side_files convert/prune convert/written",
    "convert/cut.py": "convert/prune convert/written convert/card convert/two_readings bad_selection",
    "convert/expert_mapping.py": "convert/parsers convert/prune convert/written bad_selection",
    "convert/folder.py": "convert/parsers convert/written convert/side_files convert/prune bad_checkpoint",
    "convert/forms.py": "convert/forms convert/load convert/from_hf convert/to_hf convert/mxfp4",
    "convert/hf.py": "convert/parsers convert/forms convert/from_hf convert/load convert/two_readings bad_checkpoint "
    "packed",
    "convert/mapping.py": "convert/mapping convert/forms convert/from_hf convert/to_hf convert/load",
    "convert/mxfp4.py": "convert/mxfp4 convert/forms convert/prune packed",
    "convert/orbax.py": "convert/orbax convert/to_hf convert/load convert/parsers bad_checkpoint",
    "convert/published.py": "convert/to_hf convert/prune convert/orbax",
    "convert/rounding.py": "convert/mxfp4 convert/forms convert/from_hf convert/to_hf",
    "convert/scores.py": "convert/scores choose",
    "convert/shards.py": "convert/shards convert/parsers convert/written convert/prune convert/to_hf bad_checkpoint",
    "convert/sources.py": "convert/load convert/orbax convert/prune convert/side_files bad_checkpoint",
    "convert/tensors.py": "convert/from_hf convert/load convert/forms convert/prune bad_checkpoint",
    "gptoss_jax/data/answers.py": "answers",
    "gptoss_jax/data/batching.py": "batching rows dataset profile",
    "gptoss_jax/data/conversation.py": "conversation rows harmony",
    "gptoss_jax/data/dataset.py": "dataset stable merge rows",
    "gptoss_jax/data/formats.py": "formats conversation rows",
    "gptoss_jax/data/groups.py": "dataset profile merge",
    "gptoss_jax/data/harmony.py": "harmony conversation shipped",
    "gptoss_jax/data/messages.py": "formats conversation harmony rows",
    "gptoss_jax/data/parts.py": "options_reach eval_command",
    "gptoss_jax/data/remarks.py": "remarks rows sources profile",
    "gptoss_jax/data/rows.py": "rows dataset harmony bad_data",
    "gptoss_jax/data/sources.py": "sources rows bad_data",
    "gptoss_jax/data/spellings.py": "conversation interface harmony rows",
    "gptoss_jax/data/splits.py": "sources rows dataset",
    "gptoss_jax/data/template.py": "conversation harmony rows interface",
    "gptoss_jax/data/tokens.py": "harmony conversation rows shipped",
    "gptoss_jax/kernels/grouped.py": "grouped experts gradients",
    "gptoss_jax/kernels/mxfp4.py": "packed experts convert/mxfp4",
    "gptoss_jax/kernels/splash.py": "splash plan",
    "gptoss_jax/network/attention.py": "attention masked model splash packed generate",
    "gptoss_jax/network/batch.py": "batching masked experts model",
    "gptoss_jax/network/cache.py": "generate",
    "gptoss_jax/network/experts.py": "experts packed masked model mesh gradients",
    "gptoss_jax/network/model.py": "packed masked model gradients stream generate mesh",
    "gptoss_jax/network/moe.py": "experts masked model stream",
    "gptoss_jax/network/rope.py": "config model config_oracle",
    "gptoss_jax/network/router.py": "experts masked model",
    "gptoss_jax/network/source.py": "packed masked stream mesh bad_checkpoint convert/load convert/forms",
    "gptoss_jax/network/swap.py": "swap mesh",
    "gptoss_jax/selection/by_layer.py": "select bad_selection convert/prune",
    "gptoss_jax/selection/blend.py": "choose",
    "gptoss_jax/selection/budgets.py": "choose",
    "gptoss_jax/selection/choice.py": "choose",
    "gptoss_jax/selection/coverage.py": "choose",
    "gptoss_jax/selection/criteria.py": "select",
    "gptoss_jax/selection/evidence.py": "choose",
    "gptoss_jax/selection/intervals.py": "intervals report",
    "gptoss_jax/selection/keep_sets.py": "select bad_selection convert/prune convert/card",
    "gptoss_jax/selection/mixes.py": "choose",
    "gptoss_jax/selection/origin.py": "select bad_selection merge convert/prune convert/card",
    "gptoss_jax/selection/ranking.py": "select intervals bad_selection report convert/prune convert/card",
    "gptoss_jax/selection/serving.py": "choose convert/card",
    "gptoss_jax/statistics/counted.py": "choose select",
    "gptoss_jax/statistics/eaft.py": "select profile report resume",
    "gptoss_jax/statistics/store.py": "merge intervals report resume profile",
    "gptoss_jax/statistics/sums.py": "experts merge intervals report profile masked resume",
    "gptoss_jax/statistics/tables.py": "select merge report profile bad_selection",
    "gptoss_jax/statistics/weightings.py": "interface profile rows",
}

# Mutants that no test can notice, and why.
EQUIVALENT: dict[str, str] = {
    "gptoss_jax/kernels/grouped.py: TPU_PIECE = 16384 => TPU_PIECE = 16383": "how many tiles run at a time is speed",
    "gptoss_jax/statistics/tables.py: if not E or any(not np.array_equal(x, y) for x, y in zip((layers, experts), "
    "_grid(len(table), E), strict=True)): => if not E or any(not np.array_equal(x, y) for x, y in zip((layers, "
    "experts), _grid(len(table), E), strict=False)):": "both are pairs",
    "gptoss_jax/data/batching.py: best = bisect_left(room, (len(document.token_ids), 0)) => best = bisect_left(room, "
    "(len(document.token_ids), -1))": "no row has a number below 0",
    "gptoss_jax/kernels/mxfp4.py: exponent = jnp.where(largest > 0, jnp.frexp(largest)[1] - 1 - LARGEST_EXPONENT, 0) "
    "=> exponent = jnp.where(largest > -1, jnp.frexp(largest)[1] - 1 "
    "- LARGEST_EXPONENT, 0)": "zeros are zeros under any exponent",
    "gptoss_jax/kernels/mxfp4.py: exponent = jnp.where(largest > 0, jnp.frexp(largest)[1] - 1 - LARGEST_EXPONENT, 0) "
    "=> exponent = jnp.where(largest > 0, jnp.frexp(largest)[1] - 1 "
    "- LARGEST_EXPONENT, 1)": "zeros are zeros under any exponent",
    "gptoss_jax/data/tokens.py: ROWS_AT_ONCE = 256  # the tokenizer gives offsets as Python tuples, some 300 bytes a "
    "token => ROWS_AT_ONCE = 257  # the tokenizer gives offsets as "
    "Python tuples, some 300 bytes a token": "memory alone",
    "gptoss_jax/network/attention.py: at_once = (GRADIENT_SCORES if place.differentiable else "
    "SCORES_AT_ONCE[place.platform]) // (H * M * M) => at_once = (GRADIENT_SCORES if place.differentiable else "
    "SCORES_AT_ONCE[place.platform]) + (H * M * M)": "rows at once are speed and memory",
    'gptoss_jax/network/attention.py: SCORES_AT_ONCE = {"cpu": 1 << 20, "gpu": 1 << 26} => SCORES_AT_ONCE = {"cpu": 1 '
    '<< 20, "gpu": 1 << 25}': "speed and memory of a GPU",
    "gptoss_jax/network/attention.py: return lax.cummax(jnp.where(segment_ids_BS != before, "
    "jnp.arange(segment_ids_BS.shape[1])[None], 0), axis=1) => return lax.cummax(jnp.where(segment_ids_BS != before, "
    "jnp.arange(segment_ids_BS.shape[1])[None], 1), axis=1)": "the second token is in the block of the first",
    "gptoss_jax/network/experts.py: real = jnp.where((pair < T * k)[:, None], out, 1) => real = jnp.where((pair < T * "
    "k)[:, None], out, 0)": "what is not chosen has no gradient, whatever stands there",
    "gptoss_jax/network/experts.py: order = jnp.argsort(expert_Tk.reshape(-1), stable=True) => order = "
    "jnp.argsort(expert_Tk.reshape(-1), stable=False)": "an expert computes each row by itself",
    "convert/hf.py: return outputs_first.reshape(rows.shape[1:]) => "
    "return outputs_first.reshape(rows.shape[ 0:])": "an assignment takes a first axis of one for none",
    'gptoss_jax/data/messages.py: read = OF_ALL | (OF_ASSISTANTS if role == "assistant" else OF_TOOLS if role == '
    '"tool" else set()) => read = OF_ALL | (OF_ASSISTANTS if role <= "assistant" else OF_TOOLS if role == "tool" else '
    "set())": "of all roles it is the first by letters",
    "gptoss_jax/data/batching.py: free, number = room.pop(best) if best < len(room) else (length, len(rows)) => free, "
    "number = room.pop(best) if best != len(room) else (length, "
    "len(rows))": "no place of a bisection is behind the end",
    "gptoss_jax/network/source.py: return leaf if leaf.dtype == jnp.uint8 else jax.ShapeDtypeStruct(leaf.shape, "
    "jnp.dtype(dtype)) => return leaf if leaf.dtype <= jnp.uint8 else jax.ShapeDtypeStruct(leaf.shape, "
    "jnp.dtype(dtype))": "parameters are floats or bytes",
    "convert/shards.py: assert first >= 0 and first + count <= self.shape[0], (self.name, first, count) => assert "
    "first >= 0 or first + count <= self.shape[0], (self.name, first, count)": "it guards against faults of our own",
    "convert/shards.py: HELD_BYTES = 16 << 20 => HELD_BYTES = 16 - 20": "when the page cache lets go is speed",
    "gptoss_jax/selection/criteria.py: return lambda columns, _: _mean(column)(columns, 0) ** 0.5 => return lambda "
    "columns, _: _mean(column)(columns, 1) ** 0.5": "a mean takes no seed",
    "gptoss_jax/selection/ranking.py:  => class "
    "Ranking(ByLayer):": "it has no field of its own, and inherits all that the decorator makes",
    "gptoss_jax/data/dataset.py: lengths = batching.padded_lengths(documents, self._own_size, layout.length) if "
    'layout.kind == "padded" else [] => lengths = batching.padded_lengths(documents, self._own_size, layout.length) '
    'if layout.kind is "padded" else []': "the text is one object in the program",
    "gptoss_jax/data/dataset.py: packed = self.layout.kind == "
    '"packed" => packed = self.layout.kind <= "packed"': "of all kinds it is the first by letters",
    "convert/cut.py: rows = slice(block * MXFP4_BLOCK // 2, (block + 1) * MXFP4_BLOCK // 2) => rows = slice(block * "
    "MXFP4_BLOCK // 2, (block + 1) * MXFP4_BLOCK // 1)": "later blocks write over what is too much",
    'gptoss_jax/statistics/sums.py: "computed": place.sum_experts(counts().at[groups_T1[:, '
    '0]].add(mixture.computed_Tk.sum(1))), => "computed": place.sum_experts(counts().at[groups_T1[:, '
    "-1]].add(mixture.computed_Tk.sum(1))),": "there is one column",
    "gptoss_jax/kernels/mxfp4.py: if jnp.dtype(dtype) == "
    "jnp.bfloat16: => if jnp.dtype(dtype) is jnp.bfloat16:": "the other way gives the same bits, and takes longer",
    "gptoss_jax/network/model.py: scale = self.scale[...].astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,)) => "
    "scale = self.scale[...].astype(jnp.float32).reshape((1,) * "
    "(x.ndim >> 1) + (-1,))": "axes that are missing in front are added",
    "gptoss_jax/data/spellings.py: say(f\"column{'s' * (len(fitting[0].columns) > 1)} {fitting[0].name} read as a "
    "conversation\") => say(f\"column{'s' * (len(fitting[0].columns) > 1)} {fitting[ -1].name} read as a "
    'conversation")': "there is one",
    "convert/forms.py: COMPARED_ROWS = 4096 => COMPARED_ROWS = 4097": "memory alone",
    "convert/tensors.py: FINITE_PIECE = 1 << 22  # values checked at once => FINITE_PIECE = 1 << 23  # values checked "
    "at once": "memory alone",
    'gptoss_jax/data/dataset.py: elif layout.kind == "side by side": '
    '=> elif layout.kind is "side by side":': "the text is one object in the program",
    'convert/card.py: to_mxfp4 = [form for form in kernels if quantized and form != "MXFP4"] => to_mxfp4 = [form for '
    'form in kernels if quantized and form < "MXFP4"]': "of all forms it is the last by letters",
    'gptoss_jax/data/messages.py: return "".join(texts), "".join(text for text, kind in each if kind == "thinking") '
    '=> return "".join(texts), "".join(text for text, kind in each '
    'if kind >= "thinking")': "of all kinds it is the last by letters",
    "gptoss_jax/selection/keep_sets.py:  => class "
    "KeepSets(ByLayer):": "it has no field of its own, and inherits all that the decorator makes",
    'gptoss_jax/kernels/grouped.py: TILES = {"cpu": (128, 192), "tpu": (128, 256), "gpu": (1024,)} => TILES = {"cpu": '
    '(128, 193), "tpu": (128, 256), "gpu": (1024,)}': "rows of a tile are speed",
}
