"""Bad inputs by number, and the tests that hold what the library does with each; knows names, runs nothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BadInput:
    """
    Something that goes wrong.

    Args:
        what (`str`): The input or fault.
        does (`str`): What the library does.
        tests (`dict` of `str` to `str`): By file, without "tests/test_" and ".py", the names of the tests that hold it,
            without "test_", separated by blanks; a class stands in front of its test with a dot.
    """

    what: str
    does: str
    tests: dict[str, str]


BAD_INPUTS = {
    1: BadInput(
        "weights that are empty, cut off, or claim an oversized header",
        "`AdapterLoadError` names the file, and nothing is half loaded: base, LoRA and other adapters stay as they are",
        {
            "bad_inputs": "damaged_weights_are_refused_and_the_file_named an_empty_folder_is_no_adapter",
            "bad_inputs_files": "a_good_lora_beside_what_is_refused_does_not_stay_in_the_base "
            "a_model_that_is_wrapped_already_gets_no_lora_of_an_adapter_that_is_refused "
            "a_damaged_adapter_is_not_loaded_beside_others",
            "adapters": "a_damaged_adapter_leaves_the_others_as_they_were",
            "lora": "a_bad_folder_is_refused_and_the_base_is_left_as_it_was",
            "hub": "TestRefuse.damaged_weights_are_named",
            "save_load": "a_failed_load_leaves_no_hook",
        },
    ),
    2: BadInput(
        "weights over 64 MiB",
        "refused before they are read or downloaded; an argument raises the limit",
        {
            "bad_inputs": "weights_over_the_limit_are_refused_unless_trusted the_limit_can_be_set",
            "bad_inputs_files": "a_lora_over_the_limit_is_refused_before_the_base_is_touched",
            "hub": "TestRefuse.what_is_too_large_is_not_downloaded "
            "TestRefuse.what_the_listing_does_not_tell_the_size_of_is_asked_for_it",
            "autodeco_import": "heads_over_the_limit_are_refused_and_a_base_does_not_count",
            "lora": "a_large_lora_is_loaded_only_if_it_is_asked_for",
        },
    ),
    3: BadInput(
        "tensors that are missing, too many, or named twice",
        "refused, with a list of all of them",
        {
            "bad_inputs": "wrong_tensors_are_refused_and_named every_wrong_tensor_is_listed "
            "the_message_about_a_duplicate_key_names_the_file",
            "bad_inputs_files": "a_header_of_many_names_is_refused_at_once",
            "autodeco_import": "tensors_that_are_not_exactly_the_heads_are_refused all_that_is_wrong_is_said_at_once "
            "a_header_that_names_a_tensor_twice_is_refused",
        },
    ),
    4: BadInput(
        "weights that are NaN or infinite",
        "refused on loading and on saving",
        {
            "bad_inputs": "wrong_tensors_are_refused_and_named",
            "bad_inputs_files": "what_safetensors_lets_pass_is_seen",
            "save_load": "nothing_is_saved_of_a_broken_adapter",
        },
    ),
    5: BadInput(
        "another base model",
        "an error with both numbers for another width or vocabulary; a warning for other settings of the same shape",
        {
            "bad_inputs": "an_adapter_for_another_shape_shows_both_numbers the_same_shape_from_another_base_warns "
            "its_own_base_does_not_warn a_config_for_another_shape_is_refused_with_both_numbers",
            "save_load": "the_fingerprint_ignores_where_and_how_and_sees_what",
            "convert": "a_base_of_another_shape_or_kind_is_refused",
        },
    ),
    6: BadInput(
        "a file without any head",
        "an error; a fresh adapter never takes the place of one that was to be loaded",
        {
            "bad_inputs": "wrong_tensors_are_refused_and_named the_folder_of_a_base_model_is_no_adapter",
            "autodeco_import": "without_any_head_there_is_nothing_to_load",
        },
    ),
    7: BadInput(
        "a base that is missing, gated, damaged or out of reach",
        "an error says why and what to do, and that another base can be passed; passing one works",
        {
            "bad_inputs_files": "a_base_that_cannot_be_had_is_named_and_another_one_is_taken "
            "an_adapter_whose_base_is_an_adapter_says_so",
            "hub": "TestFound.a_base_that_cannot_be_had_says_why_and_that_another_can_be_passed "
            "TestDoors.a_gated_repository_says_where_to_ask TestOffline.what_was_not_pulled_says_what_to_do",
            "save_load": "a_base_that_is_not_there_is_named an_adapter_that_names_no_base_says_what_to_do "
            "another_base_by_object_and_by_path",
            "autodeco_import": "a_base_of_unknown_kind_is_told",
        },
    ),
    8: BadInput(
        "paths, code or module names in a config",
        "settings have types and bounds, nothing else is forwarded, and a downloaded config names no local path",
        {
            "bad_inputs": "a_bad_config_is_refused settings_that_could_run_code_are_not_forwarded",
            "bad_inputs_files": "code_that_a_config_names_is_not_run "
            "a_setting_out_of_bounds_is_refused_before_anything_is_made branches_tags_and_commits_are_revisions",
            "hub": "TestChoose.nothing_leads_out_of_the_repository "
            "TestFound.a_downloaded_adapter_cannot_name_a_local_path_as_its_base",
            "save_load": "a_downloaded_adapter_may_not_name_a_local_path",
            "policies": "any_value_of_a_config_is_taken_or_refused_as_a_config_error",
            "autodeco_import": "a_config_can_neither_run_code_nor_choose_files_nor_make_labels "
            "an_index_names_files_beside_it_alone",
            "lora": "what_a_folder_says_of_its_origin_is_not_followed",
            "convert": "code_named_in_a_base_config_goes_nowhere",
        },
    ),
    9: BadInput(
        "giant or deeply nested JSON, and numbers that would fill the memory",
        "at most 1 MiB is read, and every number is checked before anything is made of it",
        {
            "bad_inputs": "a_config_that_is_no_adapters_is_refused_and_the_file_named "
            "a_config_cannot_make_the_policy_allocate_what_the_limit_forbids",
            "bad_inputs_files": "a_setting_out_of_bounds_is_refused_before_anything_is_made "
            "settings_that_mean_nothing_here_make_nothing a_header_of_many_names_is_refused_at_once",
            "policies": "read_config_refuses_a_large_file_before_reading_it "
            "a_number_of_labels_in_a_config_allocates_nothing numbers_that_tensors_cannot_hold_are_refused_or_work",
            "autodeco_import": "a_config_over_a_mebibyte_or_of_no_json_is_refused",
        },
    ),
    10: BadInput(
        "weights in a pickle",
        "never loaded; the message says to save them as safetensors",
        {
            "bad_inputs": "pickles_are_never_loaded damaged_weights_are_refused_and_the_file_named",
            "hub": "TestRefuse.pickles_are_neither_downloaded_nor_loaded",
            "autodeco_import": "pickles_are_refused",
            "convert": "a_base_of_pickles_is_refused",
        },
    ),
    11: BadInput(
        "names with signs of a shell, targets that are there already, and links",
        "there is no shell; no other model is overwritten; links neither lead out of a folder nor are written through",
        {
            "bad_inputs_files": "a_name_is_a_name_whatever_its_signs nothing_in_the_package_is_handed_to_a_shell "
            "an_adapter_is_not_saved_over_another_model a_link_is_replaced_and_what_it_points_to_stays "
            "an_adapter_is_saved_over_an_older_one_and_beside_a_tokenizer",
            "convert": "nothing_is_overwritten nothing_is_written_into_what_is_read "
            "links_out_of_a_folder_are_refused_and_the_hubs_own_cache_is_not an_index_that_points_elsewhere_is_refused",
            "hub_push": "TestSpoil.what_is_no_whole_adapter_is_refused "
            "TestFail.the_adapter_is_kept_where_the_message_says",
            "autodeco_import": "a_link_out_of_the_folder_is_refused",
            "adapters": "a_name_that_no_module_or_folder_could_have_is_refused",
        },
    ),
    12: BadInput(
        "logits that are NaN or infinite",
        "an error with step and row wherever an adapter decides; greedy and beam search stay the base model's own, and "
        "therefore do not raise; a request of a continuous batch carries its error, as transformers' own do",
        {
            "bad_inputs_logits": "broken_logits_are_named_by_step_and_row_whatever_decides "
            "broken_logits_are_named_in_a_mixed_batch "
            "what_breaks_down_is_the_error_of_its_request_in_continuous_batches",
            "generate": "broken_logits_raise_with_step_and_row a_model_with_nan_weights_raises",
            "rollout": "broken_logits_name_their_step_and_row broken_logits_name_the_row_as_the_caller_counts_them",
            "losses": "broken_rows_are_named",
        },
    ),
    13: BadInput(
        "a row in which every token is forbidden",
        "the warp leaves it as it is, and the sampler raises with step and row",
        {
            "bad_inputs_logits": "a_row_with_nothing_left_is_named_whatever_decides "
            "the_warp_leaves_a_row_without_any_token_as_it_is",
            "generate": "a_row_with_nothing_left_to_sample_raises",
        },
    ),
    14: BadInput(
        "a policy whose temperature or top-p goes to 0, or that is NaN",
        "at 0 the likeliest token stays; values keep to the configured range, in fp32; NaN is no temperature to be put "
        "in place of another, but an error with step and row",
        {
            "bad_inputs_logits": "a_head_that_goes_to_zero_leaves_the_likeliest_token "
            "a_head_that_goes_to_its_other_end_stays_within_its_range the_narrowest_action_is_greedy "
            "a_policy_whose_weights_overflow_is_named_by_step_and_row one_bad_hidden_state_is_one_rows "
            "where_the_base_is_sure_a_broken_policy_is_not_asked",
            "bad_inputs": "weights_that_are_finite_and_absurd_do_not_sample_garbage",
            "warping": "the_narrowest_setting_leaves_the_most_likely_token "
            "something_survives_and_what_was_forbidden_stays_so a_policy_that_breaks_down_never_makes_nan_scores",
            "rollout": "a_policy_that_breaks_down_is_named_by_step_and_row",
            "control": "no_hidden_state_takes_t_or_p_out_of_its_range",
        },
    ),
    15: BadInput(
        "half-precision logits that overflow once they are divided",
        "they are divided in fp32",
        {
            "bad_inputs_logits": "logits_at_the_end_of_half_precision_are_divided_in_fp32",
            "warping": "fp16_logits_at_the_end_of_their_range_do_not_overflow "
            "a_huge_temperature_flattens_and_never_makes_nan",
            "policies": "half_precision_hidden_states_give_fp32_parameters statistics_are_computed_in_fp32",
        },
    ),
    16: BadInput(
        "a budget that is no positive whole number, or does not fit the batch",
        "a `ValueError` before the model runs",
        {
            "bad_inputs": "a_bad_budget_is_refused_before_the_model_runs "
            "a_bad_budget_message_names_found_and_wanted a_bad_budget_in_a_generation_config_is_refused_too",
            "bad_inputs_calls": "a_bad_budget_is_refused_before_the_model_runs_whatever_decides "
            "a_processor_refuses_a_bad_budget_and_leaves_no_hook",
            "rollout": "bad_token_budgets_are_refused bad_parallel_budgets_are_refused",
            "prompts": "a_budget_that_cannot_be_drawn_is_named",
            "batching": "what_a_batch_cannot_do_is_refused_before_anything_runs",
        },
    ),
    17: BadInput(
        "a budget beyond what the policy was trained for",
        "it is the largest one to the policy, which warns once; `max_new_tokens` still caps",
        {
            "bad_inputs_calls": "a_budget_that_nobody_trained_for_warns_once_and_is_the_largest_to_the_policy "
            "more_samples_than_anybody_trained_for_warn_too a_huge_budget_is_no_reason_to_warn_for_who_knows_none",
            "action_policies": "a_budget_beyond_the_largest_warns_once_and_is_the_largest",
            "rollout": "a_budget_beyond_the_policys_largest_warns_once",
            "generate": "a_budget_beyond_all_bounds_is_capped_or_refused "
            "the_smaller_of_budget_and_max_new_tokens_holds",
        },
    ),
    18: BadInput(
        "an empty batch or prompt",
        "a `ValueError` before the model runs; a row of padding alone is an empty prompt wherever an adapter decides",
        {
            "bad_inputs": "an_empty_batch_or_prompt_is_refused_before_the_model_runs",
            "bad_inputs_calls": "a_prompt_of_padding_alone_is_refused an_empty_prompt_is_refused_in_continuous_batches "
            "an_empty_prompt_is_refused_by_the_engine",
            "rollout": "no_prompts_give_no_completions",
        },
    ),
    19: BadInput(
        "a tokenizer without a pad token, and padding on the right",
        "`generate` fills with the end token and warns, as transformers does; the engine pads by itself; neither "
        "changes the tokenizer or a config",
        {
            "bad_inputs_calls": "without_a_pad_token_rows_are_filled_with_eos_and_nothing_is_changed "
            "padding_on_the_right_is_warned_of "
            "a_tokenizer_without_a_pad_token_that_pads_on_the_right_is_served_and_left_as_it_is",
            "generate": "rows_of_different_budgets_without_a_pad_token_are_refused "
            "budgets_of_one_size_need_no_pad_token",
        },
    ),
    20: BadInput(
        "grammars and forbidden words",
        "what is ruled out stays ruled out",
        {
            "bad_inputs_logits": "what_a_constraint_forbids_stays_forbidden_whatever_decides",
            "generate": "the_users_processor_sees_raw_logits_and_its_mask_is_never_undone bad_words_never_come_back",
            "warping": "something_survives_and_what_was_forbidden_stays_so",
            "rollout": "the_bases_own_constraints_act_as_in_generate",
        },
    ),
    21: BadInput(
        "an exception, Ctrl-C, a streamer that leaves, calls within calls and in threads",
        "state belongs to the call: no hook and no tensor stays behind, and the next call is right",
        {
            "bad_inputs_calls": "after_an_interrupted_call_the_next_one_is_right_whatever_decides "
            "a_bare_processor_whose_call_was_interrupted_begins_anew blocks_without_the_adapter_may_overlap",
            "generate": "an_interrupted_call_leaves_the_next_one_right "
            "threads_on_one_model_do_not_hear_each_other a_generate_call_within_a_generate_call "
            "a_call_leaves_no_hook_and_no_session disabling_ends_with_its_block_even_after_an_error",
            "batching": "nothing_stays_behind_and_the_next_calls_are_right",
            "cli_mistakes": "ctrl_c_ends_a_command_in_a_line",
        },
    ),
    22: BadInput(
        "a vocabulary that is resized under an adapter",
        "the adapter becomes one for the resized base, in its config and fingerprint: heads read hidden states, which "
        "stay what they were, so that refusing would only be in the way",
        {
            "bad_inputs_calls": "a_resized_vocabulary_is_the_adapters_too "
            "resizing_to_the_same_size_changes_nothing an_adapter_of_another_base_stays_that_of_another_base "
            "every_adapter_learns_of_a_resized_vocabulary",
            "generate": "a_model_whose_vocabulary_was_resized_says_so_or_works",
        },
    ),
    23: BadInput(
        "a kill while a checkpoint is written",
        "a checkpoint is brought to disk under another name and then renamed, so it is whole or not there; nothing "
        "incomplete is ever to be skipped, and no digests of files are needed to tell",
        {
            "reinforce_recovery": "a_run_that_is_killed_again_and_again_ends_with_the_uninterrupted_runs_adapter",
            "train_heads": "a_killed_run_goes_on_from_its_last_checkpoint_and_ends_the_same",
            "train_policy": "a_killed_run_goes_on_from_its_last_checkpoint_and_ends_the_same",
            "bad_inputs_files": "a_kill_in_the_middle_of_a_save_leaves_an_adapter_that_loads",
            "evaluate": "a_killed_run_loses_the_batch_in_flight_and_ends_alike",
            "convert": "a_kill_leaves_no_target",
        },
    ),
    24: BadInput(
        "a run that is resumed",
        "bit for bit the uninterrupted one on CPU: random numbers, place in the data, baseline, step",
        {
            "training": "resuming_gives_the_uninterrupted_runs_adapter_bit_for_bit",
            "control": "resuming_gives_the_uninterrupted_runs_adapter_bit_for_bit",
            "reinforce": "resuming_gives_the_uninterrupted_runs_adapter_bit_for_bit "
            "a_resumed_run_still_measures_the_divergence_from_the_very_first_policy",
            "reinforce_recovery": "two_processes_evaluate_every_prompt_once_keep_the_best_and_resume",
        },
    ),
    25: BadInput(
        "a full disk, and a push that fails",
        "what was there stays whole, the error says how to go on, the exit code is 1, and it can be done again",
        {
            "bad_inputs_training": "a_checkpoint_without_room_keeps_the_one_before_and_training_goes_on_from_there "
            "the_first_checkpoint_without_room_says_so "
            "a_disk_that_is_really_full_keeps_the_last_whole_checkpoint "
            "a_command_on_a_full_disk_ends_with_one_line",
            "bad_inputs_files": "a_save_without_room_keeps_what_was_there small_files_are_whole_or_as_they_were_too "
            "a_disk_that_is_really_full_costs_no_adapter_that_was_there",
            "lora": "a_save_that_fails_leaves_no_part_of_a_lora",
            "convert": "a_full_disk_leaves_nothing_behind",
            "hub_push": "TestFail.the_message_says_why_and_what_to_do TestFail.done_again_it_arrives_once_and_whole "
            "TestFill.no_room_for_the_folder_sends_nothing_and_says_how_to_go_on",
            "cli_push": "what_does_not_get_there_says_why_and_how_to_send_it_again",
        },
    ),
    26: BadInput(
        "a reward that raises",
        "training stops and names the prompt, or leaves it out, counts and logs it if asked to; never a silent 0",
        {
            "reward_calls": "a_failure_names_the_prompt an_asynchronous_failure_names_the_prompt "
            "skipped_prompts_are_counted_and_named an_interrupt_is_no_failure_of_the_reward",
            "reinforce": "a_reward_that_raises_is_named_with_its_prompts_index "
            "prompts_that_a_reward_fails_on_can_be_skipped_and_are_counted",
        },
    ),
    27: BadInput(
        "a reward that hangs",
        "its process is killed at a deadline with all it started; the prompt is left out and counted, if asked to",
        {
            "reward_calls": "a_late_function_is_killed_with_all_it_started late_prompts_are_skipped "
            "a_process_that_dies_without_an_answer_is_a_failure",
            "bad_inputs_training": "training_goes_on_without_the_prompts_whose_reward_hangs",
        },
    ),
    28: BadInput(
        "rewards that are NaN, `None`, text, or too few",
        "`None` does not apply; everything else is an error with its place",
        {
            "reward_calls": "none_is_not_applicable anything_but_a_finite_number_is_an_error_with_its_place "
            "a_wrong_length_is_an_error what_is_no_list_is_an_error",
            "reinforce": "a_reward_of_nan_is_an_error several_rewards_are_weighed_and_need_not_apply",
            "evaluation": "a_reward_that_scores_too_few_is_refused",
        },
    ),
    29: BadInput(
        "rewards that are all equal, or none at all",
        "no credit, no step, no NaN",
        {
            "reinforce": "rewards_that_teach_nothing_leave_the_adapter_where_momentum_would_carry_it_on "
            "a_training_without_any_reward_changes_nothing_with_any_baseline "
            "a_batch_without_a_reward_does_not_pull_the_moving_average_to_zero",
            "credit": "equal_rewards_earn_exactly_no_credit",
        },
    ),
    30: BadInput(
        "missing columns, empty data, batches without a target",
        "an error lists the columns there are; without a target the loss is 0 and the weights stay",
        {
            "bad_inputs_training": "a_data_set_that_cannot_be_used_is_refused_by_either_trainer "
            "a_reward_without_its_column_lists_those_there_are "
            "batches_without_a_target_leave_the_adapter_and_the_others_alone",
            "training": "unusable_data_is_refused_and_its_columns_named "
            "a_batch_without_a_target_gives_zero_and_no_gradient",
            "reward_calls": "a_missing_column_is_named_before_anything_is_called",
            "prompts": "a_source_that_cannot_be_used_says_why",
            "losses": "nothing_to_learn_is_a_connected_zero",
            "tasks": "what_is_wrong_with_a_source_is_said",
        },
    ),
    31: BadInput(
        "a program that never ends, ignores signals, or leaves a daemon",
        "killed with its whole namespace within a second of its limit; no zombie stays",
        {
            "code_reward": "a_hostile_program_earns_nothing_and_ends_in_time "
            "a_daemon_dies_with_the_program_that_succeeds a_sandbox_dies_with_the_process_that_made_it",
        },
    ),
    32: BadInput(
        "a fork bomb",
        "processes are counted, whoever the user is",
        {"code_reward": "processes_are_counted a_hostile_program_earns_nothing_and_ends_in_time"},
    ),
    33: BadInput(
        "a program that takes all memory or writes without end",
        "address space, files and, where the system allows it, all processes together are bounded; so is what is read",
        {
            "code_reward": "memory_is_bounded_where_no_address_space_is "
            "all_processes_together_are_bounded_where_groups_can_be_made "
            "a_hostile_program_earns_nothing_and_ends_in_time",
        },
    ),
    34: BadInput(
        "a program that reads, writes or calls outside",
        "there is no outside: no files, no secrets, no network, no privilege",
        {
            "code_reward": "nothing_outside_can_be_read nothing_outside_can_be_written there_is_no_network "
            "no_privilege_is_left without_a_sandbox_nothing_runs a_tool_that_confines_nothing_is_not_believed",
        },
    ),
    35: BadInput(
        "a program that forges its verdict",
        "the verdict is reached outside, on plain values",
        {
            "code_reward": "a_verdict_cannot_be_forged the_expected_output_is_not_in_the_sandbox "
            "a_variable_of_the_tests_is_never_the_programs",
        },
    ),
    36: BadInput(
        "deep or huge LaTeX",
        "of a long text the end is read, the worker is killed at its deadline, and logs are cut",
        {
            "rewards": "hostile_mathematics_ends_in_time of_a_long_text_the_end_is_read "
            "a_killed_worker_costs_one_reward_and_is_counted workers_are_reused_and_bounded_in_memory "
            "the_exact_reward_is_quick_on_hostile_text",
        },
    ),
    37: BadInput(
        "HTML or YAML in tokens and names",
        "escaped in pages and cards; YAML is read by a safe loader and written by a safe dumper",
        {
            "trace": "hostile_texts_come_out_as_text_and_nothing_else "
            "any_text_comes_through_a_page_unchanged json_within_a_script_cannot_end_it",
            "cards": "hostile_names_break_neither_table_nor_metadata_nor_markers escaped_text_is_shown_as_it_is",
            "cli_config": "a_mistake_in_the_file_is_named_with_the_file",
        },
    ),
    38: BadInput(
        "pass@k with k above n",
        "a `ValueError`",
        {
            "evaluation": "pass_at_k_refuses_what_it_cannot_estimate",
            "evaluate_modules": "pass_at_k_refuses_what_it_cannot_estimate",
        },
    ),
    39: BadInput(
        "a prompt that asks for maximum randomness",
        "no prompt takes temperature or top-p out of the configured range, and commands are learned only if asked for",
        {
            "control": "no_prompt_takes_generation_out_of_the_configured_ranges "
            "no_hidden_state_takes_t_or_p_out_of_its_range without_a_weight_commands_change_nothing",
        },
    ),
    40: BadInput(
        "an adapter's name that is not known, or taken",
        "a `KeyError` that lists the names",
        {
            "adapters": "an_unknown_name_is_refused_and_the_known_ones_listed a_name_that_is_taken_is_refused "
            "an_unknown_name_in_a_batch_is_refused_before_the_model_runs",
        },
    ),
    41: BadInput(
        "a branch of the Hub that moves while it is loaded, and no Hub at all",
        "all files are of one commit; offline, the cache alone is read",
        {
            "hub": "TestMove.a_load_is_of_one_commit_whenever_the_branch_moves "
            "TestMove.a_load_that_was_cut_short_leaves_no_adapter_without_its_lora "
            "TestOffline.what_was_pulled_once_loads_without_a_request "
            "TestRefuse.a_hub_that_fails_is_done_without_where_the_cache_has_it",
            "autodeco_import": "all_files_are_of_one_commit_and_no_more_is_downloaded_than_needed",
        },
    ),
    42: BadInput(
        "processes that get unequal numbers of prompts or rewards",
        "nobody waits for ever, and means are over all processes",
        {
            "bad_inputs_training": "processes_with_unequal_numbers_of_rewards_are_one_with_all_of_them "
            "a_last_batch_that_is_short_holds_nobody_up a_reward_that_fails_in_one_process_ends_the_other_too "
            "an_epoch_cache_is_one_processs_and_several_are_told",
            "processes": "heads_learn_in_two_processes_what_they_learn_in_one",
            "reinforce_recovery": "two_processes_are_one_with_twice_the_batch "
            "two_processes_without_anything_to_decide_in_one_of_them_do_not_wait_for_each_other",
        },
    ),
    43: BadInput(
        "rows of a batch in another order",
        "each row's temperature, top-p and action stay the same, with budgets of its own too; what a mixture draws in "
        "`generate` is drawn by place, as the base model's own tokens are, and in the engine by row",
        {
            "bad_inputs_calls": "the_order_of_rows_changes_no_rows_parameters_whatever_decides",
            "generate": "a_rows_temperature_depends_on_nothing_but_the_row",
            "adapters": "the_order_of_rows_changes_no_rows_parameters",
            "rollout": "a_row_does_not_depend_on_the_other_rows_or_their_order",
            "warping": "permuting_rows_permutes_the_result",
        },
    ),
}
