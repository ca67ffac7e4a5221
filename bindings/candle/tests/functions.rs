//! The functions of candle-flash-attn, the builder, and errors.

mod common;

use candle_core::{DType, Device, Result, Tensor, Var};
use common::{eager, flat, values};
use ferroflash_candle::*;

const DTYPE: DType = DType::BF16;
const SCALE: f32 = 0.125;

fn tensor(shape: [usize; 4], seed: u64) -> Tensor {
    values(&shape, seed, DTYPE, &Device::Cpu).unwrap().to_dtype(DTYPE).unwrap()
}

/// Q of 4 heads, K and V of 2.
fn qkv(seqlen_q: usize, seqlen_k: usize) -> (Tensor, Tensor, Tensor) {
    let kv = [2, seqlen_k, 2, 64];
    (tensor([2, seqlen_q, 4, 64], 1), tensor(kv, 2), tensor(kv, 3))
}

/// Returns an error's text without the backtrace that candle adds if one is asked for.
fn message(result: Result<Tensor>) -> String {
    result.unwrap_err().to_string().lines().next().unwrap_or_default().to_owned()
}

#[test]
fn functions_are_the_builder() {
    let (q, k, v) = qkv(50, 70);
    let builder = || FlashAttn::new().scale(SCALE);
    let same = |function: Result<Tensor>, builder: FlashAttn| {
        assert_eq!(flat(&function.unwrap()).unwrap(), flat(&builder.forward(&q, &k, &v).unwrap()).unwrap());
    };
    same(flash_attn(&q, &k, &v, SCALE, false), builder());
    same(flash_attn(&q, &k, &v, SCALE, true), builder().causal());
    same(flash_attn_windowed(&q, &k, &v, SCALE, None, Some(0)), builder().causal());
    same(flash_attn_windowed(&q, &k, &v, SCALE, Some(7), Some(3)), builder().window(Some(7), Some(3)));

    let slopes = Tensor::new(&[0.5f32, 0.25, 0.1, -0.01], &Device::Cpu).unwrap();
    let alibi = || builder().alibi_slopes(&slopes);
    same(flash_attn_alibi(&q, &k, &v, &slopes, SCALE, false), alibi());
    same(flash_attn_alibi(&q, &k, &v, &slopes, SCALE, true), alibi().causal());
    same(flash_attn_alibi_windowed(&q, &k, &v, &slopes, SCALE, Some(7), None), alibi().window(Some(7), None));
    let full = |slopes, right, cap| flash_attn_alibi_windowed_softcap(&q, &k, &v, slopes, SCALE, Some(7), right, cap);
    same(full(None, None, 0.0), builder().window(Some(7), None));
    same(full(None, Some(0), 2.0), builder().window(Some(7), Some(0)).softcap(2.0));
    same(full(Some(&slopes), None, 0.0), alibi().window(Some(7), None));
    same(full(Some(&slopes), Some(2), 2.0), alibi().window(Some(7), Some(2)).softcap(2.0));

    // The default scale is 1/√64.
    same(flash_attn(&q, &k, &v, SCALE, true), FlashAttn::new().causal());

    let (o, lse) = flash_attn_with_lse(&q, &k, &v, SCALE, true).unwrap();
    let (expected_o, expected_lse) = builder().causal().forward_with_lse(&q, &k, &v).unwrap();
    assert_eq!((flat(&o).unwrap(), flat(&lse).unwrap()), (flat(&expected_o).unwrap(), flat(&expected_lse).unwrap()));
    assert_eq!((lse.dims(), lse.dtype()), (&[2, 4, 50][..], DType::F32));
}

/// Bounds are inclusive, and candle-flash-attn's rules for bounds beyond the keys hold.
#[test]
fn windows_are_those_of_candle_flash_attn() {
    let check =
        |seqlens: (usize, usize), given: (Option<usize>, Option<usize>), as_mask: (Option<u32>, Option<u32>)| {
            let (q, k, v) = qkv(seqlens.0, seqlens.1);
            let o = flash_attn_windowed(&q, &k, &v, SCALE, given.0, given.1).unwrap();
            let wide = |tensor: &Tensor| tensor.to_dtype(DType::F32).unwrap();
            let mask = Mask::Window { left: as_mask.0, right: as_mask.1 };
            let options = eager::Options { mask, ..Default::default() };
            let (expected, _) = eager::attention(&wide(&q), &wide(&k), &wide(&v), &options).unwrap();
            let apart = (wide(&o) - expected).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(apart < 0.02, "{seqlens:?} {given:?}: {apart}");
        };
    check((30, 40), (None, None), (None, None));
    check((30, 40), (Some(5), None), (Some(5), None));
    check((30, 40), (None, Some(5)), (None, Some(5)));
    check((30, 40), (Some(0), Some(0)), (Some(0), Some(0)));
    check((30, 40), (Some(usize::MAX), Some(0)), (None, Some(0)));
    // There are more queries than keys: early queries are before all keys.
    check((100, 30), (None, Some(30)), (None, Some(30)));
    check((100, 30), (None, Some(31)), (None, None));
    check((100, 30), (Some(4), None), (Some(4), Some(30)));
    check((100, 30), (Some(31), Some(2)), (None, Some(2)));
}

#[test]
fn nothing_is_kept_without_variables() {
    let (q, k, v) = qkv(20, 20);
    let (o, lse) = FlashAttn::new().forward_with_lse(&q, &k, &v).unwrap();
    assert!(!o.track_op() && !lse.track_op());
    let q = Var::from_tensor(&q).unwrap();
    let (o, lse) = FlashAttn::new().forward_with_lse(&q, &k, &v).unwrap();
    assert!(o.track_op() && lse.track_op());
}

/// Returns the gradient of Q, for a loss of O alone or of O and the LSE.
fn gradient(q: &Var, o: &Tensor, lse: Option<&Tensor>) -> Vec<f32> {
    let of_o = o.to_dtype(DType::F32).unwrap().sqr().unwrap().sum_all().unwrap();
    let loss = match lse {
        Some(lse) => (of_o + lse.sum_all().unwrap()).unwrap(),
        None => of_o,
    };
    flat(loss.backward().unwrap().get(q).unwrap()).unwrap()
}

/// One forward pass serves several backward passes, on any thread. A gradient of the LSE stays in its own pass.
#[test]
fn backward_passes_are_independent() {
    let (q, k, v) = qkv(40, 40);
    let q = Var::from_tensor(&q).unwrap();
    let attention = FlashAttn::new().causal().determinism(Determinism::Exact);
    let (o, lse) = attention.forward_with_lse(&q, &k, &v).unwrap();
    let (without, with) = (gradient(&q, &o, None), gradient(&q, &o, Some(&lse)));
    assert_ne!(without, with);
    assert_eq!(without, gradient(&q, &attention.forward(&q, &k, &v).unwrap(), None));
    std::thread::scope(|scope| {
        for index in 0..4 {
            let (q, o, lse, without, with) = (&q, &o, &lse, &without, &with);
            scope.spawn(move || {
                for _ in 0..5 {
                    match index % 2 {
                        0 => assert_eq!(&gradient(q, o, None), without),
                        _ => assert_eq!(&gradient(q, o, Some(lse)), with),
                    }
                }
            });
        }
    });
}

/// One variable as Q, K and V has the sum of their gradients.
#[test]
fn one_tensor_may_be_all_three() {
    let values = tensor([1, 60, 2, 64], 5);
    let x = Var::from_tensor(&values).unwrap();
    let copies = [0; 3].map(|_| Var::from_tensor(&values).unwrap());
    let loss = |o: Tensor| o.to_dtype(DType::F32).unwrap().sqr().unwrap().sum_all().unwrap().backward().unwrap();
    let one = loss(flash_attn(&x, &x, &x, SCALE, true).unwrap());
    let three = loss(flash_attn(&copies[0], &copies[1], &copies[2], SCALE, true).unwrap());
    let sum = copies
        .iter()
        .map(|copy| flat(three.get(copy).unwrap()).unwrap())
        .reduce(|a, b| a.iter().zip(b).map(|(a, b)| a + b).collect());
    let apart =
        flat(one.get(&x).unwrap()).unwrap().iter().zip(sum.unwrap()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(apart < 0.1, "{apart}");
}

#[test]
fn dropout_depends_on_its_seed_alone() {
    let (q, k, v) = qkv(60, 60);
    let run = |p, seed| {
        let attention = FlashAttn::new().dropout(Dropout { p, seed, offset: 0 });
        flat(&attention.forward(&q, &k, &v).unwrap()).unwrap()
    };
    assert_eq!(run(0.5, 1), run(0.5, 1));
    assert_ne!(run(0.5, 1), run(0.5, 2));
    assert_eq!(run(0.0, 1), flat(&FlashAttn::new().forward(&q, &k, &v).unwrap()).unwrap());
}

#[test]
fn there_may_be_nothing_to_do() {
    let (q, k, v) = qkv(3, 5);
    let none = |tensor: &Tensor| tensor.narrow(1, 0, 0).unwrap();
    assert_eq!(flash_attn(&none(&q), &k, &v, SCALE, false).unwrap().dims(), [2, 0, 4, 64]);
    let (o, lse) = flash_attn_with_lse(&q, &none(&k), &none(&v), SCALE, false).unwrap();
    assert!(flat(&o).unwrap().iter().all(|&o| o == 0.0));
    assert!(flat(&lse).unwrap().iter().all(|&lse| lse == f32::NEG_INFINITY));
}

#[test]
fn errors_name_the_argument() {
    let (q, k, v) = qkv(10, 20);
    let run = |q: &Tensor, k: &Tensor, v: &Tensor| message(flash_attn(q, k, v, SCALE, false));
    let wide = |tensor: &Tensor| tensor.to_dtype(DType::F32).unwrap();
    assert_eq!(
        run(&wide(&q), &wide(&k), &wide(&v)),
        "q, k and v are F32; F16 and BF16 are supported, so convert them with Tensor::to_dtype"
    );
    assert_eq!(run(&q, &wide(&k), &v), "k is F32 and q is BF16; one dtype is needed");
    assert_eq!(
        run(&q.narrow(0, 0, 1).unwrap().squeeze(0).unwrap(), &k, &v),
        "q has the shape [10, 4, 64]; (batch, seqlen, heads, head_dim) is needed"
    );
    assert_eq!(
        run(&q, &k, &v.narrow(1, 0, 19).unwrap()),
        "v has the shape (2, 19, 2, 64); (2, 20, 2, 64) is needed, as q has [2, 10, 4, 64]"
    );
    let three = q.narrow(2, 0, 3).unwrap();
    assert_eq!(run(&three, &k, &v), "heads_q is 3; a multiple of heads_kv, which is 2, is needed");
    let short = |tensor: &Tensor| tensor.narrow(3, 0, 60).unwrap();
    assert_eq!(run(&short(&q), &short(&k), &short(&v)), "head_dim is 60; allowed are the multiples of 8 from 8 to 256");
    assert_eq!(message(flash_attn(&q, &k, &v, 0.0, false)), "scale is 0; a finite number above 0 is needed");
    assert_eq!(
        message(flash_attn_alibi_windowed_softcap(&q, &k, &v, None, SCALE, None, None, -1.0)),
        "softcap is -1; a finite number above 0 is needed"
    );
    let dropout = FlashAttn::new().dropout(Dropout { p: 1.0, seed: 0, offset: 0 });
    assert_eq!(message(dropout.forward(&q, &k, &v)), "dropout.p is 1; at least 0 and below 1 is needed");
}

#[test]
fn errors_name_the_optional_input() {
    let (q, k, v) = qkv(10, 20);
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &Device::Cpu).unwrap();
    let alibi = |slopes: Tensor| message(flash_attn_alibi(&q, &k, &v, &slopes, SCALE, true));
    let shape = "(heads) or (batch, heads) is needed, as q has [2, 10, 4, 64]";
    for wrong in [&[2][..], &[2, 2], &[4, 2], &[1, 4], &[2, 4, 1], &[]] {
        assert_eq!(alibi(zeros(wrong, DType::F32)), format!("alibi_slopes has the shape {wrong:?}; {shape}"));
    }
    assert_eq!(
        alibi(zeros(&[4], DType::BF16)),
        "alibi_slopes is BF16; F32 is needed, so convert it with Tensor::to_dtype"
    );
    let sinks = |sinks: Tensor| message(FlashAttn::new().sinks(&sinks).forward(&q, &k, &v));
    for wrong in [&[2][..], &[2, 4], &[]] {
        assert_eq!(
            sinks(zeros(wrong, DType::F32)),
            format!("sinks has the shape {wrong:?}; (heads) is needed, as q has [2, 10, 4, 64]")
        );
    }
    assert_eq!(sinks(zeros(&[4], DType::F64)), "sinks is F64; F32 is needed, so convert it with Tensor::to_dtype");
}

/// Sinks may be the only variable, of another dtype, and shared by calls. A gradient stays in its own pass.
#[test]
fn sinks_have_gradients() {
    let (q, k, v) = qkv(40, 40);
    let values = values(&[4], 9, DType::BF16, &Device::Cpu).unwrap();
    let run = |attention: &FlashAttn, sinks: &Var| {
        let o = attention.clone().sinks(&sinks.to_dtype(DType::F32).unwrap()).forward(&q, &k, &v).unwrap();
        assert!(o.track_op());
        o.to_dtype(DType::F32).unwrap().sqr().unwrap().sum_all().unwrap()
    };
    let gradient = |loss: &Tensor, sinks: &Var| flat(loss.backward().unwrap().get(sinks).unwrap()).unwrap();
    let (whole, causal) = (FlashAttn::new(), FlashAttn::new().causal());
    let sinks = Var::from_tensor(&values).unwrap();
    let expected = [&whole, &causal].map(|attention| gradient(&run(attention, &sinks), &sinks));
    assert!(expected[0] != expected[1] && expected.iter().flatten().all(|&gradient| gradient < 0.0), "{expected:?}");

    // A graph may be used again, also at the same time.
    let losses = [&whole, &causal].map(|attention| run(attention, &sinks));
    std::thread::scope(|scope| {
        for index in 0..4 {
            let (loss, expected, sinks, gradient) = (&losses[index % 2], &expected[index % 2], &sinks, &gradient);
            scope.spawn(move || (0..5).for_each(|_| assert_eq!(&gradient(loss, sinks), expected)));
        }
    });

    // Both calls in one graph have the sum, in f32.
    let wide = Var::from_tensor(&values.to_dtype(DType::F32).unwrap()).unwrap();
    let parts = [&whole, &causal].map(|attention| gradient(&run(attention, &wide), &wide));
    let sum = gradient(&(run(&whole, &wide) + run(&causal, &wide)).unwrap(), &wide);
    let apart = (0..4).map(|head| (sum[head] - parts[0][head] - parts[1][head]).abs()).fold(0.0, f32::max);
    assert!(apart < 1e-3, "{apart}");
}

/// Sinks alone decide about a query without keys, and about all if they are large or small.
#[test]
fn sinks_have_limits() {
    let (q, k, v) = qkv(60, 20);
    let run = |sink: f32| {
        let sinks = Tensor::full(sink, 4, &Device::Cpu).unwrap();
        let (o, lse) = FlashAttn::new().causal().sinks(&sinks).forward_with_lse(&q, &k, &v).unwrap();
        (flat(&o).unwrap(), flat(&lse).unwrap())
    };
    let (o, lse) = run(1e4);
    assert!(o.iter().all(|&o| o == 0.0) && lse.iter().all(|&lse| lse == 1e4));
    let (o, lse) = run(-1e4);
    let (expected_o, expected_lse) = FlashAttn::new().causal().forward_with_lse(&q, &k, &v).unwrap();
    assert_eq!(o, flat(&expected_o).unwrap());
    let expected_lse = flat(&expected_lse).unwrap();
    assert!(lse.iter().zip(&expected_lse).all(|(&lse, &expected)| lse == expected.max(-1e4)));

    // No query, or no key, leaves a gradient of zeros.
    for (seqlen_q, seqlen_k) in [(0, 20), (60, 0)] {
        let sinks = Var::zeros(4, DType::F32, &Device::Cpu).unwrap();
        let part = |tensor: &Tensor, seqlen| tensor.narrow(1, 0, seqlen).unwrap();
        let (k, v) = (part(&k, seqlen_k), part(&v, seqlen_k));
        let o = FlashAttn::new().sinks(&sinks).forward(&part(&q, seqlen_q), &k, &v).unwrap();
        let gradients = o.to_dtype(DType::F32).unwrap().sum_all().unwrap().backward().unwrap();
        assert_eq!(flat(gradients.get(&sinks).unwrap()).unwrap(), [0.0; 4]);
    }
}

/// Slopes have no gradient, and are no reason to keep anything.
#[test]
fn slopes_have_no_gradient() {
    let (q, k, v) = qkv(20, 20);
    let slopes = Var::ones(4, DType::F32, &Device::Cpu).unwrap();
    assert!(!flash_attn_alibi(&q, &k, &v, &slopes, SCALE, true).unwrap().track_op());
    let q = Var::from_tensor(&q).unwrap();
    let o = flash_attn_alibi(&q, &k, &v, &slopes, SCALE, true).unwrap();
    let gradients = o.to_dtype(DType::F32).unwrap().sum_all().unwrap().backward().unwrap();
    assert!(gradients.get(&q).is_some() && gradients.get(&slopes).is_none());
}

#[test]
fn what_is_not_supported_is_an_error() {
    let (q, k, v) = qkv(10, 10);
    let x = &q;
    for (argument, result) in [
        ("seqlens_q", flash_attn_varlen(&q, &k, &v, x, x, 1, 1, SCALE, true)),
        ("seqlens_q", flash_attn_varlen_windowed(&q, &k, &v, x, x, 1, 1, SCALE, None, None)),
        ("seqlens_q", flash_attn_varlen_alibi(&q, &k, &v, x, x, x, 1, 1, SCALE, true)),
        ("seqlens_q", flash_attn_varlen_alibi_windowed(&q, &k, &v, x, x, x, 1, 1, SCALE, None, None)),
        ("seqlens_q", flash_attn_varlen_alibi_windowed_softcap(&q, &k, &v, None, x, x, 1, 1, SCALE, None, None, 0.0)),
        ("block_table", flash_attn_varlen_paged_windowed(&q, &k, &v, x, x, x, None, 1, 1, SCALE, None, None, 16, None)),
    ] {
        let message = message(result);
        assert!(message.contains(argument) && message.contains("supported so far"), "{message}");
    }
}
