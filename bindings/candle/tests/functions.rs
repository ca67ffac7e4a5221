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
    let builder = FlashAttn::new().scale(SCALE);
    let same = |function: Result<Tensor>, builder: FlashAttn| {
        assert_eq!(flat(&function.unwrap()).unwrap(), flat(&builder.forward(&q, &k, &v).unwrap()).unwrap());
    };
    same(flash_attn(&q, &k, &v, SCALE, false), builder);
    same(flash_attn(&q, &k, &v, SCALE, true), builder.causal());
    same(flash_attn_windowed(&q, &k, &v, SCALE, None, Some(0)), builder.causal());
    same(flash_attn_windowed(&q, &k, &v, SCALE, Some(7), Some(3)), builder.window(Some(7), Some(3)));
    same(flash_attn_alibi_windowed_softcap(&q, &k, &v, None, SCALE, Some(7), None, 0.0), builder.window(Some(7), None));
    // The default scale is 1/√64.
    same(flash_attn(&q, &k, &v, SCALE, true), FlashAttn::new().causal());

    let (o, lse) = flash_attn_with_lse(&q, &k, &v, SCALE, true).unwrap();
    let (expected_o, expected_lse) = builder.causal().forward_with_lse(&q, &k, &v).unwrap();
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
            let (expected, _) = eager::attention(&wide(&q), &wide(&k), &wide(&v), mask, None).unwrap();
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
    let dropout = FlashAttn::new().dropout(Dropout { p: 1.0, seed: 0, offset: 0 });
    assert_eq!(message(dropout.forward(&q, &k, &v)), "dropout.p is 1; at least 0 and below 1 is needed");
}

#[test]
fn what_is_not_supported_is_an_error() {
    let (q, k, v) = qkv(10, 10);
    let x = &q;
    for (argument, result) in [
        ("alibi_slopes", flash_attn_alibi(&q, &k, &v, x, SCALE, true)),
        ("alibi_slopes", flash_attn_alibi_windowed(&q, &k, &v, x, SCALE, None, None)),
        ("alibi_slopes", flash_attn_alibi_windowed_softcap(&q, &k, &v, Some(x), SCALE, None, None, 0.0)),
        ("softcap", flash_attn_alibi_windowed_softcap(&q, &k, &v, None, SCALE, None, None, 30.0)),
        ("seqlens_q", flash_attn_varlen(&q, &k, &v, x, x, 1, 1, SCALE, true)),
        ("seqlens_q", flash_attn_varlen_windowed(&q, &k, &v, x, x, 1, 1, SCALE, None, None)),
        ("alibi_slopes", flash_attn_varlen_alibi(&q, &k, &v, x, x, x, 1, 1, SCALE, true)),
        ("alibi_slopes", flash_attn_varlen_alibi_windowed(&q, &k, &v, x, x, x, 1, 1, SCALE, None, None)),
        ("seqlens_q", flash_attn_varlen_alibi_windowed_softcap(&q, &k, &v, None, x, x, 1, 1, SCALE, None, None, 0.0)),
        ("block_table", flash_attn_varlen_paged_windowed(&q, &k, &v, x, x, x, None, 1, 1, SCALE, None, None, 16, None)),
    ] {
        let message = message(result);
        assert!(message.contains(argument) && message.contains("supported so far"), "{message}");
    }
}
