"""Guards of the source, each taken away in a copy of the tree, and the test that must go red then.

python tests/guards.py            # tries every removal, writes docs/guards.md, exits 1 when a test stays green
python tests/guards.py NAME …     # tries some
"""

import sys
import time
from collections.abc import Iterator, Sequence

from guard_kit import ROOT, Guard, Outcome, try_all

PAGE = ROOT / "docs" / "guards.md"

SAVE = "test_guarded.py::test_all_is_on_the_disk_before_the_rename_and_older_ones_go_after_it"
DAMAGES = "test_recovery.py::test_a_thousand_damages_of_checkpoint_files_are_all_noticed"
FULL = "test_recovery.py::test_a_disk_without_room_ends_the_run_before_it_begins_and_several_failed_saves_end_it_later"
POISONED = "test_recovery.py::test_poisoned_batches"
RESUMED = "test_guarded.py::test_rows_and_counters_of_a_killed_run_are_those_of_an_uninterrupted_one"
RANDOM = "test_kill.py::test_resume_matrix[4-0-False-0-bf16-autocast]"
REASONS = "test_decode.py::test_reasons"
WORKER = "test_guarded.py::test_a_dead_worker_is_started_again_where_it_was_and_not_for_ever"
STEP = "test_guarded.py::test_gradients_are_clipped_and_the_scale_is_clamped_in_every_step"

GUARDS: dict[str, Sequence[Guard]] = {
    "train/checkpoint.py": (
        Guard("files-verified", "files are compared with the manifest by size alone",
              '            if _describe(folder / name) != manifest["files"][name]:',
              '            if (folder / name).stat().st_size != manifest["files"][name]["size"]:', DAMAGES),
        Guard("manifest-verified", "the manifest's own digest is not compared",
              ' or manifest["sha256"] != _digest(rest):', ":", DAMAGES),
        Guard("step-verified", "a checkpoint is believed to be the step that its folder's name says",
              """if folder.name != f"step-{state['step']:08d}" or manifest["step"] != state["step"]:""",
              'if manifest["step"] != state["step"]:',
              "test_guarded.py::test_a_checkpoint_under_another_steps_name_is_passed_over"),
        Guard("older-one-used", "a damaged checkpoint ends the run, intact older ones or not",
              "            damaged[folder] = str(error)\n            continue", "            raise",
              "test_recovery.py::test_a_damaged_folder_is_set_aside_and_the_run_goes_on_to_the_same_bits"),
        Guard("never-from-zero", "a run whose checkpoints are all damaged starts again without a word",
              "    if damaged:\n        raise", "    if not root.exists():\n        raise",
              "test_train.py::test_a_damaged_checkpoint_is_passed_over_by_name_and_never_silently_replaced_by_a_"
              "fresh_start"),
        Guard("damaged-set-aside", "damaged checkpoints are deleted",
              "            _set_aside(other)", "            shutil.rmtree(other)",
              "test_recovery.py::test_a_damaged_folder_is_set_aside_and_the_run_goes_on_to_the_same_bits"),
        Guard("never-written-over", "a folder of the same step is deleted by a save",
              "            _set_aside(final)", "            shutil.rmtree(final)",
              "test_guarded.py::test_a_step_that_is_there_is_never_written_over"),
        Guard("commit-last", "the folder has its name before the manifest is in it",
              '        _write_json(partial / "MANIFEST.json", {**manifest, "sha256": _digest(manifest)})\n',
              "        os.rename(partial, final)\n"
              '        _write_json(final / "MANIFEST.json", {**manifest, "sha256": _digest(manifest)})\n'
              "        os.rename(final, partial)\n", SAVE),
        Guard("tensors-synced", "tensors may still be in memory when the folder gets its name",
              "    written = write_tensors(path, tensors)\n    sync_to_disk(path)",
              "    written = write_tensors(path, tensors)", SAVE),
        Guard("folder-synced", "the folder's entries may not be on the disk when it gets its name",
              "        sync_to_disk(partial)\n", "", SAVE),
        Guard("name-synced", "the folder's name may not be on the disk when older ones are deleted",
              "        sync_to_disk(root)\n", "", SAVE),
        Guard("older-deleted-last", "older checkpoints are deleted before the new one is there",
              "    partial.mkdir()\n",
              "    partial.mkdir()\n    for old in checkpoints(root):\n        shutil.rmtree(old)\n", SAVE),
        Guard("room-checked", "a save begins whether there is room or not",
              "    if free < needed:", "    if free < 0:", FULL),
        Guard("short-tensors-noticed", "a file of tensors that ends early is committed",
              '    if path.stat().st_size != written["size"]:', "    if not path.exists():",
              "test_kill.py::test_faults_aimed_at_a_save[model.safetensors]"),
        Guard("short-json-noticed", "a state.json that ends early is committed",
              "    if path.stat().st_size != len(content):", "    if not path.exists():",
              "test_kill.py::test_faults_aimed_at_a_save[state.json]"),
        Guard("moments-strict", "moments of parameters that are not there are dropped",
              "    if rest:\n        raise KeyError", "    if not optimizer.state:\n        raise KeyError",
              "test_guarded.py::test_moments_of_unknown_parameters_are_refused"),
        Guard("moments-laid-out", "moments come back in another memory format than their parameter",
              "_laid_out_as(parameter, rest.pop(key)) for", "rest.pop(key) for",
              "test_train.py::test_a_run_stopped_between_checkpoints_continues_to_the_same_bits"),
        Guard("best-verified", "the best checkpoint becomes the result unread",
              "    verify(folder)\n    load_strictly", "    load_strictly",
              "test_guarded.py::test_a_damaged_best_checkpoint_never_becomes_the_result"),
    ),
    "train/saver.py": (
        Guard("background-copies", "a save in a thread writes what later steps make of the weights",
              "{} if background else None", "None",
              "test_guarded.py::test_a_background_save_holds_the_weights_of_its_own_step"),
        Guard("failed-save-said", "a failed save goes to the log alone",
              "        self._log.warn(\n", "        self._log.event(\n", FULL),
        Guard("failed-saves-end-it", "training goes on for ever without a checkpoint",
              "        if final or self._failed >= MAX_FAILED:", "        if final:", FULL),
        Guard("final-save-raises", "a run ends well although its last save failed",
              "        if final or self._failed >= MAX_FAILED:", "        if self._failed >= MAX_FAILED:", FULL),
    ),
    "train/guards.py": (
        Guard("signals-caught", "SIGTERM and SIGUSR1 end the process where it is",
              "(signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)", "(signal.SIGINT,)",
              "test_guarded.py::test_a_signal_requests_a_stop[15]"),
        Guard("second-interrupt", "a run whose step hangs cannot be interrupted",
              "        if self._signalled and number == signal.SIGINT:", "        if number < 0:",
              "test_guarded.py::test_a_second_interrupt_ends_at_once"),
        Guard("time-limit", "--max-minutes does nothing",
              "        return self._signalled or time.monotonic() >= self._deadline", "        return self._signalled",
              "test_recovery.py::test_a_time_limit_saves_and_the_next_call_continues"),
        Guard("lock", "two trainers write into one folder",
              "            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)",
              "            fcntl.lockf(file, fcntl.LOCK_UN)",
              "test_guarded.py::test_a_folder_has_one_trainer_as_long_as_it_lives"),
        Guard("gradient-watched", "a gradient that is not finite passes when its loss is finite",
              "torch.isfinite(loss) & torch.isfinite(norm)", "torch.isfinite(loss)",
              "test_guarded.py::test_a_gradient_alone_that_is_not_finite_skips_the_step"),
        Guard("bad-share", "any share of bad samples is replaced by others",
              "        if bad > self._max_share * total:", "        if bad > total:",
              "test_recovery.py::test_the_counters_of_bad_samples_survive_a_checkpoint"),
    ),
    "train/session.py": (
        Guard("first-save", "a disk that refuses is met after hours of training",
              "        session.save(final=True)  #", "        #", FULL),
        Guard("sweep", "what killed saves left stays for ever",
              '    checkpoint.sweep(folder / "checkpoints")\n', "",
              "test_recovery.py::test_what_dead_processes_left_is_swept"),
        Guard("same-data", "a run goes on with other data than it began with",
              '        if state["data"] != self.setup.train.fingerprint:', '        if not state["data"]:',
              "test_recovery.py::test_other_data_than_before_is_refused"),
        Guard("random-state", "dropout starts again from the seed",
              "        _set_random_state(self.setup.device, state)\n", "",
              RANDOM),
        Guard("counters-restored", "bad samples from before a kill are forgotten",
              '        self.bad.restore(state["bad"])\n', "", RESUMED),
        Guard("rows-rewound", "rows of steps that are done again stand twice in metrics.jsonl",
              "        self.log.rewind(found.step)\n", "", RESUMED),
        Guard("skips-restored", "stops in the midst of skipped steps put off the return",
              'FiniteGuard(state["in_row"])', "FiniteGuard()",
              "test_guarded.py::test_skipped_steps_are_counted_across_stops"),
        Guard("threads-said", "another number of threads goes to the log alone",
              '        log.warn(f"the last bits', '        log.event(f"the last bits',
              "test_recovery.py::test_another_number_of_threads_is_said"),
        Guard("return-after-five", "weights that have gone bad are never left",
              "        if session.guard.in_row < MAX_SKIPPED:", "        if session.guard.in_row:", f"{POISONED}[5]"),
        Guard("moved-on", "a return meets the same batches again",
              "seen - found.step, returns", "0, returns", f"{POISONED}[5]"),
        Guard("stop-after-three", "a run returns again and again",
              "        if session.state.returns >= MAX_RETURNS:", "        if session.state.returns >= 1000:",
              f"{POISONED}[50]"),
    ),
    "train/loop.py": (
        Guard("no-save-in-a-row", "the place to return to may hold weights that have gone bad",
              " and not session.guard.in_row\n", "\n", f"{POISONED}[5]"),
        Guard("stop-looked-at", "a stop request is met at the end of the run",
              "        stop = session.stop.requested", "        stop = False",
              "test_recovery.py::test_a_time_limit_saves_and_the_next_call_continues"),
        Guard("same-settings", "a run goes on with other settings than it began with",
              "        if differing:", "        if not claimed:",
              "test_train.py::test_a_folder_of_another_run_is_refused_by_key"),
    ),
    "train/step.py": (
        Guard("step-skipped", "a step that is not finite reaches the weights",
              "            optimizer.found_inf = found_inf", "            found_inf", f"{POISONED}[1]"),
        Guard("gradients-clipped", "one batch moves the weights as far as it likes",
              'config.optim.clip_norm or float("inf"))', 'float("inf"))', STEP),
        Guard("scale-clamped", "the scale grows until exponentials overflow",
              "        model.clamp_scale()\n", "", STEP),
    ),
    "train/accumulate.py": (
        Guard("same-dropout", "the second pass of a micro-batch drops other patches than the first",
              "        _set_random_state(device, state)\n", "",
              "test_accumulate.py::test_dropped_patches_are_the_same_in_both_passes"),
    ),
    "data/order.py": (
        Guard("order-from-hash", "the order comes from numpy's global generator",
              "np.random.Generator(np.random.Philox(key=hash64(*key))).permutation(num)", "np.random.permutation(num)",
              "test_order.py::test_a_position_depends_on_nothing_before_it"),
    ),
    "data/loader.py": (
        Guard("augmentation-from-hash", "crops come from torch's global generator",
              "        seed = hash64(self.order.seed, epoch, record.id)",
              "        seed = int(torch.randint(2**62, ()))",
              "test_loader.py::test_a_batch_depends_on_its_positions_alone"),
        Guard("replacement-from-hash", "what stands in for a bad sample comes from numpy's global generator",
              "index = order.replacement(position, attempt)", "index = np.random.randint(order.num_samples)",
              "test_guarded.py::test_replacements_are_the_same_for_every_reader"),
        Guard("bad-named", "bad samples are replaced without a word",
              "            bad.append(problem)\n", "",
              "test_loader.py::test_a_bad_image_is_replaced_and_nothing_after_it_shifts"),
        Guard("own-generator", "the loader draws from the generator that dropout uses",
              "        generator=torch.Generator(),", "", RANDOM),
        Guard("worker-restarted", "a dead worker ends the run",
              "            deaths += 1\n", "            raise\n", WORKER),
        Guard("restart-in-place", "after a dead worker the batches begin anew",
              "_loader(reader, step, last_step, pin_memory)", "_loader(reader, first_step, last_step, pin_memory)",
              WORKER),
        Guard("restarts-limited", "workers that always die are started for ever",
              "            if deaths == MAX_DEATHS:", "            if deaths == 20:", WORKER),
        Guard("stall-said", "a loader that is stuck says nothing",
              "            if waited >= said + STALL_SECONDS:", "            if waited < 0:",
              "test_recovery.py::test_a_slow_reader_is_said"),
    ),
    "data/decode.py": (
        Guard("formats-listed", "every decoder that Pillow has is open to foreign bytes",
              "Image.open(BytesIO(data), formats=FORMATS)", "Image.open(BytesIO(data))", REASONS),
        Guard("pixels-first", "pixels are counted after they have been decoded",
              "        _check_shape(id, *image.size, max_pixels)\n",
              "        image.load()\n        _check_shape(id, *image.size, max_pixels)\n", REASONS),
        Guard("pixels-capped", "an image may take as much memory as Pillow allows",
              "    if width * height > max_pixels:", "    if width * height > 10 * max_pixels:", REASONS),
        Guard("shape-capped", "scaling an image of 60,000 × 1 pixels takes gigabytes",
              "    if max(width, height) > MAX_SIDE_RATIO * min(width, height):", "    if min(width, height) < 0:",
              REASONS),
        Guard("any-failure-named", "what a decoder raises on damaged bytes ends the run",
              "    except Exception as error:  # decoders", "    except ValueError as error:  # decoders",
              REASONS),
    ),
    "data/shards/tar.py": (
        Guard("extent-checked", "a file that reaches beyond the shard's end counts as there",
              "        if offset > file_size:", "        if offset > file_size + 10**12:",
              "test_sources.py::test_messages_say_what_is_missing"),
        Guard("header-checked", "a damaged header ends the shard without an error, as in tarfile",
              """            raise _damaged(path, f"expected a file's header at byte {offset}, {found} before it")""",
              "            return", "test_sources.py::test_what_is_no_tar"),
        Guard("end-checked", "a shard cut between two files is read short",
              "    if length < 2 * _BLOCK or file_size % _BLOCK:", "    if file_size % _BLOCK:",
              "test_sources.py::test_a_truncated_shard_is_an_error_at_every_place"),
    ),
    "data/shards/index.py": (
        Guard("counts-compared", "a shard with fewer images than its stats say is read short",
              "    if expected != images:", "    if expected < images:",
              "test_sources.py::test_stats_are_held_against_the_shard"),
        Guard("changed-shard", "offsets of a shard are used in another file of its name",
              "        if changed or status.st_size != self.size:", "        if status.st_size < 0:",
              "test_sources.py::test_a_shard_that_changes_or_goes_is_a_bad_sample"),
    ),
    "data/shards/columns.py": (
        Guard("index-verified", "a damaged byte of a cached index is believed",
              "if zlib.crc32(self._data[chunk * CHUNK : (chunk + 1) * CHUNK]) != self._sums[chunk]:",
              "if not self._sums:",
              "test_index.py::test_no_damaged_byte_is_believed"),
    ),
    "data/shards/source.py": (
        Guard("no-commands", "a path that is a command gets as far as the file system",
              '        if part.startswith("pipe:"):', '        if part == "pipe:":',
              "test_sources.py::test_commands_are_refused"),
    ),
    "data/shards/remote.py": (
        Guard("download-whole", "a connection that ends early leaves a short shard",
              "            if size is not None and length != size:", "            if not length:",
              "test_remote.py::test_what_comes_short_is_tried_again"),
        Guard("secrets-hidden", "messages show the user and password of an address",
              "{host.rpartition('@')[2]}", "{host}", "test_remote.py::test_addresses_that_cannot_be_meant"),
    ),
    "data/formats/hf_datasets.py": (
        Guard("hub-refused", "the name of a dataset on the hub gets as far as its library",
              "    if place.is_dir() and names_dataset(str(place)):",
              "    if not place.is_dir() or names_dataset(str(place)):",
              "test_formats.py::test_the_hub_is_refused"),
    ),
    "objective/losses.py": (
        Guard("zero-vectors", "a zero vector becomes NaN",
              "F.normalize(features.float(), dim=-1, eps=1e-8)",
              "features.float() / features.float().norm(dim=-1)[:, None]",
              "test_objective.py::test_unit_is_safe_at_zero_and_in_low_precision"),
    ),
    "objective/tiled.py": (
        Guard("underflow", "sums of exponentials that underflow give an infinite loss",
              "    underflown = bool((torch.minimum(row.min(), column.min()) < _SMALLEST).item())",
              "    underflown = False",
              "test_tiled.py::test_sums_that_underflow_fall_back_to_running_maxima"),
        Guard("overflow", "exponentials overflow at a large scale",
              "    shift = (scale - _LARGEST).clamp(min=0.0)", "    shift = torch.zeros_like(scale)",
              "test_guarded.py::test_near_negatives_at_a_large_scale_do_not_overflow"),
    ),
    "store/embed.py": (
        Guard("features-finite", "infinite features of a frozen tower are stored",
              "    if not torch.isfinite(features).all():", "    if torch.isnan(features).all():",
              "test_store.py::test_features_beyond_fp16_are_stored_in_fp32_and_infinite_ones_are_refused"),
    ),
    "store/read.py": (
        Guard("store-verified", "a flipped byte of stored embeddings is believed",
              "    if (thorough or size <= FULL_CHECK_BYTES) and digest_file(path) != sha256:", "    if not sha256:",
              "test_store.py::test_a_damaged_store_is_an_error_of_one_line[flipped]"),
    ),
    "run/finished.py": (
        Guard("result-verified", "a finished model whose weights have changed is loaded",
              '    if digest_file(weights) != described["sha256"]:',
              '    if not described["sha256"]:',
              "test_train.py::test_a_changed_weights_file_is_refused"),
    ),
    "commands/convert.py": (
        Guard("weights-only", "a foreign checkpoint runs code when it is opened",
              "weights_only=True, mmap", "weights_only=False, mmap",
              "test_convert.py::test_code_in_a_checkpoint_is_refused_by_name_and_not_run[True]"),
        Guard("torch-recent", "foreign files are opened by a torch whose reader had holes",
              "    if Version(torch.__version__).release < SAFE_SINCE.release:", "    if not torch.__version__:",
              "test_guarded.py::test_an_old_torch_opens_no_foreign_file"),
        Guard("no-programs", "a TorchScript program gets as far as torch's reader",
              """any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist()):""",
              "path.suffix == '.script':", "test_guarded.py::test_a_program_is_refused_before_torch_reads_it"),
    ),
    "towers/weights.py": (
        Guard("pickle-refused", "a pickle is opened where weights are expected",
              "    if Path(path).suffix in PICKLES:", "    if not Path(path).name:",
              "test_convert.py::test_weights_of_timm_come_through_unchanged"),
        Guard("weights-strict", "weights that are missing stay random, and those left over are dropped",
              "    if missing or unexpected or misshapen:\n",
              "    state = {key: state.get(key, value) for key, value in own.items()}\n    if misshapen:\n",
              "test_towers.py::test_a_weights_file_beside_a_timm_name_is_loaded_strictly"),
    ),
    "towers/frozen/hf.py": (
        Guard("hf-no-code", "a model's own code is run", "            trust_remote_code=False,\n            output",
              "            trust_remote_code=True,\n            output",
              "test_layout.py::test_no_pickle_and_no_network_client_in_the_source"),
    ),
    "towers/frozen/timm.py": (
        Guard("network-when-asked", "weights are fetched although a file is given",
              "pretrained=not (local or at)", "pretrained=True",
              "test_towers.py::test_a_weights_file_beside_a_timm_name_is_loaded_strictly"),
    ),
    "towers/frozen/base.py": (
        Guard("eval-for-ever", "a frozen tower drops and normalises as in training when somebody calls train()",
              "        if self.module.training:\n            self.module.eval()\n", "",
              "test_towers.py::test_eval_for_ever_no_gradient_and_never_changed"),
        Guard("no-gradient", "a frozen tower's weights ask for gradients",
              "module.eval().requires_grad_(False)", "module.eval()",
              "test_frozen_hf.py::test_every_tower_is_eval_for_ever_without_gradient"),
    ),
    "report/tables.py": (
        Guard("text-escaped", "a caption's markup is part of the report",
              "c if isinstance(c, Html) else html.escape(c) for c", "c if isinstance(c, Html) else str(c) for c",
              "test_report.py::test_foreign_text_stays_text"),
    ),
    "report/examples.py": (
        Guard("images-inside", "a path in compare.json puts any image of the disk into the report",
              "if inside and file.is_file()", "if file.is_file()",
              "test_report.py::test_images_that_are_missing_or_outside_are_named"),
    ),
}  # fmt: skip


def every() -> Iterator[tuple[str, Guard]]:
    """Each guard with its file."""
    for file, guards in GUARDS.items():
        for guard in guards:
            yield file, guard


def page(outcomes: Sequence[tuple[str, Guard, Outcome]]) -> str:
    """docs/guards.md: a table for each file."""
    lines = [
        "# Guards and what misses them",
        "",
        f"{len(outcomes)} guards, each taken away on purpose by [tests/guards.py](../tests/guards.py) in a copy of the "
        "tree, what the source",
        "does without it, and what the named test said. `python tests/guards.py` tries them all and writes this page.",
    ]
    for file in GUARDS:
        lines += ["", f"## {file}", "", "| guard | without it | test | says |", "|---|---|---|---|"]
        for _, guard, outcome in (entry for entry in outcomes if entry[0] == file):
            says = outcome.says if len(outcome.says) <= 160 else f"{outcome.says[:160]} …"
            cells = (guard.name, guard.without, f"`{guard.test}`", f"`` {says} ``")
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main(names: Sequence[str]) -> int:
    unknown = set(names) - {guard.name for _, guard in every()}
    if unknown:
        print(f"no such guard: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    guards = [(file, guard) for file, guard in every() if not names or guard.name in names]
    begun = time.monotonic()

    def told(guard: Guard, outcome: Outcome) -> None:
        mark = "red  " if outcome.red else "GREEN"
        print(
            f"{mark} {guard.name:24} {outcome.seconds:5.1f} s  {guard.test}: {outcome.says}"[:230], flush=True
        )

    outcomes = try_all(guards, told)
    num_red = sum(outcome.red for outcome in outcomes)
    print(f"{num_red} of {len(guards)} removals are noticed, {time.monotonic() - begun:.0f} s")
    if not names:
        entries = [(*entry, outcome) for entry, outcome in zip(guards, outcomes, strict=True)]
        PAGE.write_text(page(entries), encoding="utf-8")
    return int(num_red < len(guards))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
