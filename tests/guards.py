"""Guards of the source, each removed in a copy of the tree, and the test that must fail then.

python tests/guards.py                # removes each guard, writes docs/generated/guards.md, exits 1 when a test passes
python tests/guards.py NAME …         # removes some
python tests/guards.py --diff NAME …  # shows what a removal does to the source
"""

import os
import sys
import time
from collections.abc import Iterator, Sequence

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}  # before torch and the hub's client are imported

from guard_edits import (
    always,
    argument,
    assigned,
    before,
    catch,
    compared,
    drop,
    drop_operand,
    instead,
    never,
    read,
)
from guard_kit import ROOT, Guard, Outcome, difference, try_all

PAGE = ROOT / "docs" / "generated" / "guards.md"

AWKWARD = "test_awkward_workers.py"
BITS = "test_train.py::test_a_run_stopped_between_checkpoints_continues_to_the_same_bits"
DAMAGED = "test_recovery.py::test_a_damaged_folder_is_set_aside_and_the_run_goes_on_to_the_same_bits"
DAMAGES = "test_recovery.py::test_a_thousand_damages_of_checkpoint_files_are_all_noticed"
DEATHS = f"{AWKWARD}::test_a_worker_that_dies_or_hangs_is_started_again_where_it_was"
FULL = "test_recovery.py::test_a_disk_without_room_ends_the_run_before_it_begins_and_several_failed_saves_end_it_later"
INTACT = "test_train.py::test_a_damaged_checkpoint_is_passed_over_by_name_and_never_silently_replaced_by_a_fresh_start"
HIDDEN = "test_awkward_pictures.py::test_a_header_never_hides_the_size_of_what_is_decoded"
LIMIT = "test_recovery.py::test_a_time_limit_saves_and_the_next_call_continues"
POISONED = "test_recovery.py::test_poisoned_batches"
RANDOM = "test_kill.py::test_resume_matrix[4-0-False-0-bf16-autocast]"
REASONS = "test_decode.py::test_reasons"
RESUMED = "test_guarded.py::test_rows_and_counters_of_a_killed_run_are_those_of_an_uninterrupted_one"
SAVE = "test_guarded.py::test_all_is_on_the_disk_before_the_rename_and_older_ones_go_after_it"
TOGETHER = "test_processes.py"
SHARES = "test_shards.py"
SIDE = "test_side_by_side.py"
STEP = "test_guarded.py::test_gradients_are_clipped_and_the_scale_is_clamped_in_every_step"
STRICT = "test_towers.py::test_a_weights_file_beside_a_timm_name_is_loaded_strictly"
WORKER = "test_guarded.py::test_a_dead_worker_is_started_again_where_it_was_and_not_for_ever"

RENAMED_EARLY = "os.rename({rename.0}, {rename.1}); os.rename({rename.1}, {rename.0})"

GUARDS: dict[str, Sequence[Guard]] = {
    "Checkpoints are verified": (
        Guard("files-verified", "files are compared with the manifest by size alone", "checkpoint.verify",
              compared('{}["size"]', "describe"), DAMAGES),
        Guard("manifest-verified", "the manifest's own digest is not compared", "checkpoint.verify",
              drop_operand("digest"), DAMAGES),
        Guard("step-verified", "a checkpoint is believed to be the step that its folder's name says",
              "checkpoint.verify", drop_operand("step-"),
              "test_guarded.py::test_a_checkpoint_under_another_steps_name_is_passed_over"),
        Guard("older-one-used", "a damaged checkpoint ends the run, intact older ones or not", "checkpoint.find",
              catch("CheckpointError"), DAMAGED),
        Guard("never-from-zero", "a run whose checkpoints are all damaged starts again without a word",
              "checkpoint.find", never(raises="CheckpointError"), INTACT),
        Guard("damaged-set-aside", "damaged checkpoints are deleted", "checkpoint.find",
              instead("set_aside", "shutil.rmtree({0})"), DAMAGED),
        Guard("moments-strict", "moments of parameters that are not there are dropped", "load_optimizer_tensors",
              never(raises="KeyError"), "test_guarded.py::test_moments_of_unknown_parameters_are_refused"),
        Guard("moments-laid-out", "moments come back in another memory format than their parameter",
              "load_optimizer_tensors", instead("laid_out_as", "{1}"), BITS),
        Guard("best-verified", "the best checkpoint becomes the result unread", "read_model", drop("verify"),
              "test_guarded.py::test_a_damaged_best_checkpoint_never_becomes_the_result"),
        Guard("result-verified", "a finished model whose weights have changed is loaded", "read_weights",
              never("sha256"), "test_train.py::test_a_changed_weights_file_is_refused"),
    ),
    "Checkpoints are written whole": (
        Guard("room-checked", "a save begins whether there is room or not", "_need_room", never(raises="OSError"),
              FULL),
        Guard("never-written-over", "a folder of the same step is deleted by a save", "checkpoint.save",
              instead("set_aside", "shutil.rmtree({0})"),
              "test_guarded.py::test_a_step_that_is_there_is_never_written_over"),
        Guard("commit-last", "the folder has its name before the manifest is in it", "checkpoint.save",
              before("write_json", RENAMED_EARLY, "MANIFEST.json"), SAVE),
        Guard("tensors-synced", "tensors may still be in memory when the folder gets its name",
              "checkpoint._write_tensors", drop("sync_to_disk"), SAVE),
        Guard("folder-synced", "the folder's entries may not be on the disk when it gets its name",
              "checkpoint.save", drop("sync_to_disk", which=(1, 2)), SAVE),
        Guard("name-synced", "the folder's name may not be on the disk when older ones are deleted",
              "checkpoint.save", drop("sync_to_disk", which=(2, 2)), SAVE),
        Guard("older-deleted-last", "older checkpoints are deleted before the new one is there", "checkpoint.save",
              before("write_json", "for old in {checkpoints}: shutil.rmtree(old)", "state.json"), SAVE),
        Guard("short-tensors-noticed", "a file of tensors that ends early is committed",
              "checkpoint._write_tensors", never(raises="OSError"),
              "test_kill.py::test_faults_aimed_at_a_save[model.safetensors]"),
        Guard("short-json-noticed", "a state.json that ends early is committed", "checkpoint._write_json",
              never(raises="OSError"), "test_kill.py::test_faults_aimed_at_a_save[state.json]"),
        Guard("background-copies", "a save in a thread writes what later steps make of the weights",
              "Saver.__init__", never("background"),
              "test_guarded.py::test_a_background_save_holds_the_weights_of_its_own_step"),
        Guard("failed-save-said", "a failed save goes to the log alone", "Saver.wait",
              instead("warn", "{of}.event({all})"), FULL),
        Guard("failed-saves-end-it", "training goes on for ever without a checkpoint", "Saver.wait",
              drop_operand("MAX_FAILED"), FULL),
        Guard("final-save-raises", "a run ends well although its last save failed", "Saver.wait",
              drop_operand("final"), FULL),
    ),
    "A run is stopped and continued": (
        Guard("signals-caught", "SIGTERM and SIGUSR1 end the process where it is", "StopRequest.__enter__",
              read("SIGNALS", "{}[:1]"), "test_guarded.py::test_a_signal_requests_a_stop[15]"),
        Guard("second-interrupt", "a run whose step hangs cannot be interrupted", "StopRequest._request",
              never(raises="KeyboardInterrupt"), "test_guarded.py::test_a_second_interrupt_ends_at_once"),
        Guard("time-limit", "--max-minutes does nothing", "StopRequest.requested", drop_operand("monotonic"), LIMIT),
        Guard("stop-looked-at", "a stop request is met at the end of the run", "Session.agree",
              read("requested", "False"), LIMIT),
        Guard("lock", "two trainers write into one folder", "folder_lock", drop("lockf"),
              "test_guarded.py::test_a_folder_has_one_trainer_as_long_as_it_lives"),
        Guard("same-settings", "a run goes on with other settings than it began with", "holds_run",
              never(raises="CheckpointError"), "test_train.py::test_a_folder_of_another_run_is_refused_by_key"),
        Guard("same-data", "a run goes on with other data than it began with", "Session.restore",
              never("fingerprint"), "test_recovery.py::test_other_data_than_before_is_refused"),
        Guard("same-tower", "a run goes on with another third tower than it began with", "Session.restore",
              never("replaced"), "test_further_runs.py::test_a_run_does_not_continue_with_another_tower"),
        Guard("other-tower-said", "figures of a replaced tower say nothing", "evaluate_run",
              drop("check_thirds"),
              "test_further_runs.py::test_a_tower_replaced_after_training_is_said_by_evaluate"),
        Guard("never-random", "a tower's file that is not named means random weights", "load_timm",
              never(raises="UsageError"), "test_further_runs.py::test_an_at_without_a_file_never_means_random_weights"),
        Guard("changed-data-said", "an evaluation on other data than before says nothing", "evaluate_run",
              never("changed"), "test_awkward_changes.py::test_an_evaluation_says_which_part_has_changed"),
        Guard("compared-on-the-same-data", "runs are compared that saw different data", "compare.runs.is_done",
              never(raises="CheckpointError"),
              "test_awkward_changes.py::test_a_comparison_on_changed_data_is_refused"),
        Guard("first-save", "a disk that refuses is met after hours of training", "session._begin", drop("save"), FULL),
        Guard("end-looked-at", "classes that cannot be classified are met after training", "open_session",
              drop("check_evaluation"), "test_awkward_ends.py"
              "::test_classes_that_cannot_be_classified_are_met_before_the_first_step[missing-training]"),
        Guard("sweep", "what killed saves left stays for ever", "open_session", drop("sweep"),
              "test_recovery.py::test_what_dead_processes_left_is_swept"),
        Guard("threads-said", "another number of threads goes to the log alone", "session._go_on",
              instead("warn", "{of}.event({all})", which=(2, 2)),
              "test_recovery.py::test_another_number_of_threads_is_said"),
        Guard("random-state", "dropout starts again from the seed", "Session.restore", drop("set_random_state"),
              RANDOM),
        Guard("counters-restored", "bad samples from before a kill are forgotten", "Session.restore",
              drop("bad.restore"), RESUMED),
        Guard("rows-rewound", "rows of steps that are done again stand twice in metrics.jsonl", "Session.restore",
              drop("rewind"), RESUMED),
        Guard("skips-restored", "stops in the midst of skipped steps put off the return", "Session.restore",
              argument("FiniteGuard", 0, None),
              "test_guarded.py::test_skipped_steps_are_counted_across_stops"),
        Guard("order-from-hash", "the order comes from numpy's global generator", "order._shuffled",
              instead("Generator", "np.random"), "test_order.py::test_a_position_depends_on_nothing_before_it"),
        Guard("augmentation-from-hash", "crops come from torch's global generator", "BatchReader._read",
              instead("hash64", "int(torch.randint(2**62, ()))", "order"),
              "test_loader.py::test_a_batch_depends_on_its_positions_alone"),
        Guard("replacement-from-hash", "what stands in for a bad sample comes from numpy's global generator",
              "usable_sample", instead("replacement", "np.random.randint({of}.num_samples)"),
              "test_guarded.py::test_replacements_are_the_same_for_every_reader"),
        Guard("own-generator", "the loader draws from the generator that dropout uses", "workers._start",
              argument("DataLoader", "generator", None), f"{AWKWARD}::test_loading_draws_no_random_number"),
    ),
    "Steps": (
        Guard("gradient-watched", "a gradient that is not finite passes when its loss is finite", "FiniteGuard.watch",
              drop_operand("isfinite", which=(2, 2)),
              "test_guarded.py::test_a_gradient_alone_that_is_not_finite_skips_the_step"),
        Guard("step-skipped", "a step that is not finite reaches the weights", "TrainingStep.__call__",
              instead("found_inf", "{} * 0"), f"{POISONED}[1]"),
        Guard("no-save-in-a-row", "the place to return to may hold weights that have gone bad", "loop._steps",
              drop_operand("in_row"), f"{POISONED}[5]"),
        Guard("return-after-five", "weights that have gone bad are never left", "too_many_skipped",
              always("MAX_SKIPPED"), f"{POISONED}[5]"),
        Guard("moved-on", "a return meets the same batches again", "return_to_checkpoint",
              assigned("skipped_batches", "0"), f"{POISONED}[5]"),
        Guard("stop-after-three", "a run returns again and again", "too_many_skipped", never("MAX_RETURNS"),
              f"{POISONED}[50]"),
        Guard("gradients-clipped", "one batch moves the weights as far as it likes", "TrainingStep.__call__",
              argument("clip_grads_with_norm_", 1, 'float("inf")'), STEP),
        Guard("scale-clamped", "the scale grows until exponentials overflow", "TrainingStep.__call__",
              drop("clamp_scale"), STEP),
        Guard("same-dropout", "the second pass of a micro-batch drops other patches than the first",
              "accumulate.accumulate", drop("set_random_state", which=(1, 2)),
              "test_accumulate.py::test_dropped_patches_are_the_same_in_both_passes"),
        Guard("zero-vectors", "a zero vector becomes NaN", "losses.unit",
              instead("normalize", "{0} / {0}.norm(dim=-1)[:, None]"),
              "test_objective.py::test_unit_is_safe_at_zero_and_in_low_precision"),
        Guard("underflow", "sums of exponentials that underflow give an infinite loss", "tiled.softmax_share",
              instead("item", "False"), "test_tiled.py::test_sums_that_underflow_fall_back_to_running_maxima"),
        Guard("overflow", "exponentials overflow at a large scale", "tiled.softmax_share", instead("clamp", "{} * 0"),
              "test_guarded.py::test_near_negatives_at_a_large_scale_do_not_overflow"),
    ),
    "Loading": (
        Guard("bad-share", "any share of bad samples is replaced by others", "BadSamples.add",
              never(raises="DataError"),
              "test_recovery.py::test_the_counters_of_bad_samples_survive_a_checkpoint"),
        Guard("bad-named", "bad samples are replaced without a word", "usable_sample", drop("append"),
              "test_loader.py::test_a_bad_image_is_replaced_and_nothing_after_it_shifts"),
        Guard("worker-restarted", "a dead worker ends the run", "read_ahead", catch("Exception"), WORKER),
        Guard("restart-in-place", "after a dead worker the batches begin anew", "read_ahead",
              argument("start", 1, "{parameter.1}"), WORKER),
        Guard("restarts-limited", "workers that always die are started for ever", "read_ahead",
              read("MAX_DEATHS", "20"), WORKER),
        Guard("stall-said", "a loader that is stuck says nothing", "_Watch._watch", never("said"),
              "test_recovery.py::test_a_slow_reader_is_said"),
        Guard("hung-ended", "workers that hang are waited for until the end of time", "_Watch._watch",
              never("HUNG_SECONDS"), f"{DEATHS}[hung]"),
        Guard("half-read", "a message that a dead worker began is read for ever", "_Watch._watch",
              never("can_block"), f"{DEATHS}[half a message]"),
        Guard("shared-memory", "a batch without room in shared memory ends the run", "workers._pack",
              catch("OSError"), f"{AWKWARD}::test_without_shared_memory_items_come_through_the_pipe"),
        Guard("any-error-arrives", "an error that cannot be pickled never arrives", "_Packing.__getitem__",
              catch("SystemExit"), f"{AWKWARD}::test_an_error_in_a_worker_arrives_in_one_line[of a local class]"),
        Guard("no-workers", "a machine that refuses another process ends the run", "read_ahead", catch("OSError"),
              f"{AWKWARD}::test_workers_that_cannot_be_started_are_done_without"),
    ),
    "Images": (
        Guard("formats-listed", "every decoder that Pillow has is open to foreign bytes", "decode._read",
              argument("Image.open", "formats", None), REASONS),
        Guard("pixels-first", "pixels are counted after they have been decoded", "decode._read",
              before("_check_shape", "{upright_rgb}"), REASONS),
        Guard("pixels-capped", "an image may take as much memory as Pillow allows", "_check_shape",
              never(raises="too many pixels"), REASONS),
        Guard("shape-capped", "scaling an image of 60,000 × 1 pixels takes gigabytes", "_check_shape",
              never(raises="extreme shape"), REASONS),
        Guard("frames-measured", "an AVIF whose header states a small size takes gigabytes", "decode._read",
              never("AVIF"), HIDDEN),
        Guard("tiles-capped", "a TIFF of a few pixels takes gigabytes for its tiles", "_check_tiff",
              never(raises="too many pixels"), HIDDEN),
        Guard("tiff-compressions", "every decoder that libtiff has is open to foreign bytes", "_check_tiff",
              never(raises="unsupported format"),
              "test_awkward_pictures.py::test_formats_that_are_not_read_are_named_with_what_to_do"),
        Guard("cut-scan", "a JPEG that is cut counts as whole, its lower part grey", "_repaired",
              always("array_equal"),
              "test_awkward_pictures.py::test_a_jpeg_without_its_end_mark_is_whole_and_one_with_a_missing_byte_is_not"),
        Guard("text-is-text", "captions with the name of a special token have other ids in an export",
              "FileTokenizer._encode", assigned("encode_special_tokens", "False"),
              "test_awkward_texts.py::test_open_clip_reads_the_exported_tokenizer_alike_or_the_card_says_where_not"),
        Guard("marks-kept-apart", "the name of a special token in a caption ends it", "without_marks",
              instead("sub", "text"),
              "test_awkward_texts.py::test_a_caption_with_a_special_token_in_it_is_read_to_its_end"),
        Guard("prefix-told", "a prefix is taken off weights that fit with it", "_without_prefix",
              never("best"), "test_awkward_weights.py::test_nothing_is_taken_off_what_fits_or_what_cannot_be_told"),
        Guard("causal-first-token", "the first token of a causal model, equal for all texts, is taken for features",
              "text._width", never("cls"),
              "test_awkward_towers.py::test_the_first_token_of_a_causal_model_is_neither_taken_nor_proposed"),
        Guard("any-failure-named", "what a decoder raises on damaged bytes ends the run", "decode._read",
              catch("Exception", "ValueError"), REASONS),
    ),
    "Shards and saved datasets": (
        Guard("extent-checked", "a file that reaches beyond the shard's end counts as there", "tar.walk",
              never(">", raises="damaged"), "test_sources.py::test_messages_say_what_is_missing"),
        Guard("header-checked", "a damaged header ends the shard without an error, as in tarfile", "tar.walk",
              before("damaged", "return", which=(2, 5)), "test_sources.py::test_what_is_no_tar"),
        Guard("end-checked", "a shard cut between two files is read short", "tar._check_end", drop_operand("<"),
              "test_sources.py::test_a_truncated_shard_is_an_error_at_every_place"),
        Guard("counts-compared", "a shard with fewer images than its stats say is read short", "check_stats",
              never(raises="DataError"), "test_sources.py::test_stats_are_held_against_the_shard"),
        Guard("changed-shard", "offsets of a shard are used in another file of its name", "Shard.open",
              never(raises="OSError"), "test_sources.py::test_a_shard_that_changes_or_goes_is_a_bad_sample"),
        Guard("index-verified", "a damaged byte of a cached index is believed", "Columns._check", never("crc32"),
              "test_index.py::test_no_damaged_byte_is_believed"),
        Guard("no-commands", "a path that is a command gets as far as the file system", "shards.places.expand",
              never("pipe:"), "test_sources.py::test_commands_are_refused"),
        Guard("download-whole", "a connection that ends early leaves a short shard", "remote._download.copy",
              never(raises="OSError"), "test_remote.py::test_what_comes_short_is_tried_again"),
        Guard("secrets-hidden", "messages show the user and password of an address", "remote.redacted",
              instead("rpartition", '("", "", {of})'), "test_remote.py::test_addresses_that_cannot_be_meant"),
        Guard("hub-refused", "the name of a dataset on the hub gets as far as its library", "hf_datasets._place",
              always("names_dataset"), "test_formats.py::test_the_hub_is_refused"),
    ),
    "Tables, folders and parts": (
        Guard("part-known", "rows whose `split` is no part become training data", "parts.check_known",
              never(raises="DataError"), "test_awkward_parts.py::test_a_value_that_is_no_part_is_named[fold1]"),
        Guard("held-out-stays", "an image that is in training and in the test stays in training", "Merged._set_part",
              instead("max", "{0}"),
              "test_awkward_parts.py::test_an_image_of_two_parts_is_kept_out_of_training_and_named"),
        Guard("swallowed-rows", "an unpaired quote takes the rows up to the next one with it", "rows._records",
              instead("_swallowed", "False"),
              "test_awkward_tables.py::test_a_quote_that_pairs_up_many_rows_later_swallows_none"),
        Guard("addresses-refused", "a table of addresses is a table of missing files", "tables._check_addresses",
              always("addresses"), "test_awkward_tables.py::test_addresses_are_refused_in_one_line[t.csv-http]"),
        Guard("alike-asked", "of two columns that can be the captions one is taken without a word",
              "Captions.by_content", never(raises="UsageError"),
              "test_awkward_columns.py::test_two_columns_that_are_alike_are_asked_about"),
        Guard("pictures-named", "a picture of a format that is not read is left out without a word",
              "folders.image_files", drop("append", "_unread"),
              "test_awkward_folders.py::test_a_folder_of_other_formats_alone_says_so"),
        Guard("texts-named", "a caption without an image is left out without a word", "folders.image_files",
              drop("append", "detail"), "test_awkward_folders.py::test_texts_without_an_image_are_named"),
        Guard("lists-bounded", "a list in a cell can be deeper than Python's stack", "cells._texts",
              drop_operand("_MAX_DEPTH"), "test_awkward_cells.py::test_lists_too_deep_are_no_captions[900]"),
    ),
    "Frozen towers, stores and foreign weights": (
        Guard("features-finite", "infinite features of a frozen tower are stored", "embed._checked",
              never("isfinite"),
              "test_store.py::test_features_beyond_fp16_are_stored_in_fp32_and_infinite_ones_are_refused"),
        Guard("store-verified", "a flipped byte of stored embeddings is believed", "open_store",
              never("digest_file"), "test_store.py::test_a_damaged_store_is_an_error_of_one_line[flipped]"),
        Guard("weights-only", "a foreign checkpoint runs code when it is opened", "convert._weights_only",
              argument("torch.load", "weights_only", "False"),
              "test_convert.py::test_code_in_a_checkpoint_is_refused_by_name_and_not_run[True]"),
        Guard("torch-recent", "foreign files are opened by a torch whose reader had holes", "convert._weights_only",
              never("SAFE_SINCE"), "test_guarded.py::test_an_old_torch_opens_no_foreign_file"),
        Guard("no-programs", "a TorchScript program gets as far as torch's reader", "convert._weights_only",
              never("/constants.pkl"), "test_guarded.py::test_a_program_is_refused_before_torch_reads_it"),
        Guard("pickle-refused", "a pickle is opened where weights are expected", "refuse_pickle", never("PICKLES"),
              "test_convert.py::test_weights_of_timm_come_through_unchanged"),
        Guard("weights-strict", "weights that are missing stay random, and those left over are dropped",
              "load_strictly",
              (never(raises="CheckpointError"), argument("load_state_dict", "strict", "False")), STRICT),
        Guard("start-compared", "a tower that computes other features than its source in transformers is trained",
              "clip._compare", never(raises="CheckpointError"),
              "test_start_clip.py::test_towers_that_compute_something_else_are_refused[image]"),
        Guard("hf-no-code", "a model's own code is run", "hf.load_model",
              argument("from_pretrained", "trust_remote_code", "True"),
              "test_layout.py::test_no_pickle_and_no_network_client_in_the_source"),
        Guard("network-when-asked", "weights are fetched although a file is given", "load_timm",
              argument("create_model", "pretrained", "True"), STRICT),
        Guard("eval-for-ever", "a frozen tower drops and normalises as in training when somebody calls train()",
              "FrozenTower.__call__", never("training"),
              "test_towers.py::test_eval_for_ever_no_gradient_and_never_changed"),
        Guard("no-gradient", "a frozen tower's weights ask for gradients", "FrozenTower.__post_init__",
              instead("requires_grad_", "{of}"),
              "test_frozen_hf.py::test_every_tower_is_eval_for_ever_without_gradient"),
    ),
    "The report": (
        Guard("text-escaped", "a caption's markup is part of the report", "tables.join",
              instead("escape", "str({0})"), "test_report.py::test_foreign_text_stays_text"),
        Guard("images-inside", "a path in compare.json puts any image of the disk into the report", "pictures",
              instead("is_relative_to", "True"),
              "test_report.py::test_images_that_are_missing_or_outside_are_named"),
    ),
    "Several processes": (
        Guard("shares-equal", "processes have different numbers of samples", "check_divisible",
              never(raises="UsageError", which=(2, 2)), f"{TOGETHER}::test_what_cannot_be_trained_together_is_refused"),
        Guard("batch-norms-refused", "each process normalises by the statistics of its own share", "check_shares",
              never(raises="UsageError"), f"{TOGETHER}::test_what_cannot_be_trained_together_is_refused"),
        Guard("equal-start", "processes train different models, and average them", "check_equal",
              never(raises="CheckpointError"), f"{TOGETHER}::test_what_cannot_be_trained_together_is_refused"),
        Guard("gradients-added", "each process moves its weights by its own gradient", "Gradients.collect",
              drop("add_gradients"), f"{TOGETHER}::test_two_processes_train_as_one[lit]"),
        Guard("scattered", "a gathered view has the gradient of one process's logits alone", "Processes.add_scattered",
              drop("reduce_scatter_single"), f"{TOGETHER}::test_two_processes_train_as_one[lit]"),
        Guard("shares-added", "the gradients of towers that are cut up are averaged, and those of heads added",
              "shards.shard", drop("set_gradient_divide_factor"),
              f"{SHARES}::test_a_step_of_shares_is_the_step_of_one[False]"),
        Guard("norm-of-all", "each process clips by the norm of its own shares", "Gradients.norm",
              instead("add", "{0}"), f"{SHARES}::test_a_step_of_shares_is_the_step_of_one[False]"),
        Guard("disk-of-all", "a disk that refuses one process's shares leaves the others waiting",
              "Processes.failing_together", never("found"),
              f"{SHARES}::test_a_disk_that_refuses_one_process_refuses_all"),
        Guard("own-dropout", "a continued run of several processes draws other random numbers", "Processes.seed",
              drop("manual_seed"),
              f"{TOGETHER}::test_a_continued_run_of_two_processes_is_the_uninterrupted_one_to_the_bit"),
        Guard("bad-of-all", "the share of bad samples is that of the first process", "Session.agree",
              never("some", which=(1, 1)), f"{TOGETHER}::test_bad_samples_are_counted_over_all_processes"),
        Guard("one-writes", "every process names bad samples in the file", "BadSamples.add", drop_operand("writes"),
              f"{TOGETHER}::test_bad_samples_are_counted_over_all_processes"),
    ),
    "Runs side by side": (
        Guard("worker-death-seen", "a killed run is waited for as long as a process of its own lives",
              "Worker.received", assigned("alive", "True"),
              f"{SIDE}::test_what_one_run_ends_with_is_said_when_the_others_are_saved"),
        Guard("others-saved", "runs beside one that fails are not asked to save", "side_by_side.side_by_side",
              drop("send", which=(1, 2)), f"{SIDE}::test_what_one_run_ends_with_is_said_when_the_others_are_saved"),
        Guard("parent-death-seen", "runs go on when their command is killed", "side_by_side._listen",
              drop("request", which=(0, 2)), f"{SIDE}::test_a_killed_comparison_ends_soon_and_continues"),
        Guard("early-signal-kept", "a Ctrl-C kills runs that are starting", "Worker.__init__",
              instead("pthread_sigmask", "set()", which=(1, 2)),
              f"{SIDE}::test_a_signal_to_a_worker_that_starts_is_not_lost"),
        Guard("stored-before", "processes side by side embed the same images", "train_all",
              drop("make_shared"), f"{SIDE}::test_runs_side_by_side_have_the_bits_of_runs_after_each_other"),
        Guard("choice-kept", "a continued comparison changes the threads of its runs", "concurrency.choose",
              never("recorded"), f"{SIDE}::test_the_choice_is_recorded_and_taken_again_unless_another_is_asked_for"),
    ),
}  # fmt: skip


def every() -> Iterator[Guard]:
    for guards in GUARDS.values():
        yield from guards


def page(outcomes: dict[str, Outcome]) -> str:
    """docs/generated/guards.md: a table for each topic."""
    lines = [
        "# Guards and the tests that miss them",
        "",
        f"[tests/guards.py](../../tests/guards.py) removes each of {len(outcomes)} guards in a copy of the source",
        "and runs one test, which must fail. The tables show what the source does without the guard and how the test",
        "failed. `make guards` writes this page.",
    ]
    for topic, guards in GUARDS.items():
        lines += [
            "",
            f"## {topic}",
            "",
            "| guard | function | without it | test | failure |",
            "|---|---|---|---|---|",
        ]
        for guard in guards:
            says = outcomes[guard.name].says
            says = says if len(says) <= 160 else f"{says[:160]} …"
            cells = (guard.name, f"`{guard.function}`", guard.without, f"`{guard.test}`", f"`` {says} ``")
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main(words: Sequence[str]) -> int:
    names = [word for word in words if word != "--diff"]
    unknown = set(names) - {guard.name for guard in every()}
    if unknown:
        print(f"no such guard: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    guards = [guard for guard in every() if not names or guard.name in names]
    if "--diff" in words:
        for guard in guards:
            print(f"# {guard.name}: {guard.without}\n{difference(guard)}")
        return 0
    begun = time.monotonic()

    def report(guard: Guard, outcome: Outcome) -> None:
        mark = "fails " if outcome.red else "PASSES"
        line = f"{mark} {guard.name:24} {outcome.seconds:5.1f} s  {guard.test}: {outcome.says}"
        print(line[:230], flush=True)

    outcomes = try_all(guards, report)
    num_red = sum(outcome.red for outcome in outcomes.values())
    print(f"{num_red} of {len(guards)} removals are noticed, {time.monotonic() - begun:.0f} s")
    if not names:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(outcomes), encoding="utf-8")
    return int(num_red < len(guards))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
