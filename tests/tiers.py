"""The tiers of tests: files of the fast tier, ``make test``. Every other test file is slow.

Within these files single tests carry the mark ``slow``. Together they have every public function
(in the examples of its docstring), the contract of all optimizers, parity with Optax and
galore-torch, an exact resume and sharded steps (test_minimal), and the command lines.
"""

FAST = {
    *("test_structure", "test_docs", "test_contributing", "test_versions", "test_command"),
    *("test_contract", "test_composition", "test_errors", "test_structural_args"),
    *("test_parity_optax", "test_parity_galore_torch", "test_parity_natural_galore"),
    *("test_woodbury", "test_residual", "test_transition", "test_projection", "test_orthonormal"),
    *("test_memory_report", "test_memory_tables", "test_parameter_names", "test_dependence"),
    "test_minimal",
    *("test_cli", "test_data_files", "test_data_ngram", "test_data_packing", "test_data_split"),
    *("test_data_splits", "test_data_tokenizer", "test_options_file"),
    *("test_loggers", "test_reporter", "test_tables", "test_utilization"),
    *("test_glue_data", "test_glue_scores"),
    *("test_functions_data", "test_functions_metrics", "test_functions_parse"),
    *("test_functions_prompts", "test_functions_splits", "test_functions_write"),
}
