//! Results and gradients of every case on the CPU.

mod common;

use candle_core::Device;
use common::cases::CASES;

fn judge(name: &str) {
    let case = CASES.iter().find(|case| case.name == name).expect("a case of this name");
    let judged = common::judge(case, &Device::Cpu).unwrap();
    let failures = judged.iter().filter(|judged| !judged.passes()).collect::<Vec<_>>();
    assert!(failures.is_empty(), "{name}: {failures:#?}");
}

/// Makes a test for each case.
macro_rules! tests {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            judge(stringify!($name));
        })*

        #[test]
        fn every_case_has_a_test() {
            let names = CASES.iter().map(|case| case.name).collect::<Vec<_>>();
            assert_eq!(names, [$(stringify!($name)),*]);
        }
    };
}

tests! {
    bf16 bf16_causal f16 f16_causal
    packed_qkv gradient_of_a_sum strided_head_dim misaligned heads_first repeated_heads one_key_head
    gradient_of_the_lse gradient_of_both
    window causal_window rows_without_keys one_query
    head_dim_40 head_dim_128 head_dim_256
    dropout
    softcap softcap_causal
    alibi alibi_causal alibi_per_item alibi_heads_first
    sinks sinks_causal sinks_gradient_of_the_lse sinks_gradient_of_both sinks_without_gradient sinks_strided
    sinks_rows_without_keys sinks_packed_qkv sinks_repeated_heads
    softcap_and_alibi softcap_and_sinks alibi_and_sinks sinks_and_dropout
    all all_one_key_head all_head_dim_128 all_head_dim_256
}
