#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| vmm_fuzz::snapshot_state(data));
