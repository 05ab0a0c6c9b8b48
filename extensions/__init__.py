"""Extensions: every package here is loaded at the start; docs/extensions.md says how to write one."""
