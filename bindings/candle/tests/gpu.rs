//! What the tests on the CPU check, on a GPU; and the speed compared with candle's own operations. Prints a table last.
//!
//! With a number as its argument it uses that device, and otherwise device 0.

mod common;

use std::process::ExitCode;
use std::time::Instant;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::ops::{softmax, softmax_last_dim};
use common::cases::CASES;
use common::training::{Kind, compare, train};
use common::{eager, flat, judge, values};
use ferroflash_candle::{Determinism, Dropout, FlashAttn, Mask, flash_attn};

/// Speed that is asked for, as a multiple of candle's own.
const SPEEDUP: f64 = 50.0;

/// Lines of the table, and the number of failures among them.
#[derive(Default)]
struct Report {
    lines: Vec<String>,
    passed: usize,
    failed: usize,
}

impl Report {
    fn line(&mut self, name: &str, outcome: std::result::Result<String, String>) {
        let (mark, detail) = match outcome {
            Ok(detail) => {
                self.passed += 1;
                ("ok", detail)
            }
            Err(detail) => {
                self.failed += 1;
                // candle may add a backtrace.
                ("FAILED", detail.lines().next().unwrap_or_default().to_owned())
            }
        };
        self.lines.push(format!("{name:<34} {mark:<6} {detail}"));
    }
}

fn main() -> ExitCode {
    let ordinal = std::env::args().nth(1).and_then(|argument| argument.parse().ok()).unwrap_or(0);
    let mut report = Report::default();
    for (stream, device) in [("default", Device::new_cuda(ordinal)), ("new", Device::new_cuda_with_stream(ordinal))] {
        match device {
            Ok(device) => check(stream, &device, &mut report),
            Err(error) => report.line(&format!("device {ordinal}, {stream} stream"), Err(error.to_string())),
        }
    }
    match Device::new_cuda(ordinal) {
        Ok(device) => {
            report.line("speed", speed(&device).map_err(|error| error.to_string()).and_then(|outcome| outcome))
        }
        Err(error) => report.line("speed", Err(error.to_string())),
    }
    println!("{}", report.lines.join("\n"));
    println!("{} passed, {} failed", report.passed, report.failed);
    if report.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Runs every check on one device of candle, which has one stream.
fn check(stream: &str, device: &Device, report: &mut Report) {
    for case in CASES {
        let outcome = judge(case, device).map_err(|error| error.to_string()).and_then(|judged| {
            let share = judged.iter().map(|judged| judged.error / judged.allowed).fold(0.0, f32::max);
            let failures = judged.iter().filter(|judged| !judged.passes()).collect::<Vec<_>>();
            if failures.is_empty() {
                Ok(format!("{share:.2} of the error allowed"))
            } else {
                Err(format!("{failures:?}"))
            }
        });
        report.line(&format!("{stream} stream, {}", case.name), outcome);
    }
    for (name, check) in [
        ("training, bf16", (|device| trained(device, DType::BF16)) as fn(&Device) -> Result<Outcome>),
        ("training, f16", |device| trained(device, DType::F16)),
        ("the same bits", same_bits),
        ("the same bits, all options", same_bits_of_all),
        ("inputs on another device", other_device),
        ("dropout as on the CPU", dropout),
        ("other threads", threads),
        ("nothing to do", nothing),
    ] {
        let outcome = check(device).map_err(|error| error.to_string()).and_then(|outcome| outcome);
        report.line(&format!("{stream} stream, {name}"), outcome);
    }
}

type Outcome = std::result::Result<String, String>;

fn trained(device: &Device, dtype: DType) -> Result<Outcome> {
    let (eager, flash) = (train(device, Kind::Eager)?, train(device, Kind::Flash(dtype))?);
    Ok(compare(&eager, &flash).map(|()| format!("{:.3} to {:.3}", flash[0], flash[flash.len() - 1])))
}

/// Random bf16 tensors Q, K and V of 8 query heads and 2 key heads.
fn tensors(device: &Device, seqlen: usize) -> Result<[Tensor; 3]> {
    let make = |heads, seed| values(&[2, seqlen, heads, 64], seed, DType::BF16, device)?.to_dtype(DType::BF16);
    Ok([make(8, 1)?, make(2, 2)?, make(2, 3)?])
}

/// Returns O and the gradients.
fn with_gradients(attention: &FlashAttn, tensors: &[Tensor; 3]) -> Result<Vec<Vec<f32>>> {
    let [q, k, v] = [0, 1, 2].map(|index: usize| Var::from_tensor(&tensors[index]));
    let (q, k, v) = (q?, k?, v?);
    let o = attention.forward(&q, &k, &v)?;
    let gradients = o.to_dtype(DType::F32)?.sqr()?.sum_all()?.backward()?;
    let gradient = |of: &Var| flat(gradients.get(of).expect("a gradient"));
    Ok(vec![flat(&o)?, gradient(&q)?, gradient(&k)?, gradient(&v)?])
}

fn same_bits(device: &Device) -> Result<Outcome> {
    let tensors = tensors(device, 1000)?;
    let attention = FlashAttn::new().causal().determinism(Determinism::Exact);
    let first = with_gradients(&attention, &tensors)?;
    for run in 1..10 {
        if with_gradients(&attention, &tensors)? != first {
            return Ok(Err(format!("run {run} differs")));
        }
    }
    Ok(Ok("10 runs".to_owned()))
}

/// The same with softcap, ALiBi and sinks, whose gradient is one more result.
fn same_bits_of_all(device: &Device) -> Result<Outcome> {
    let [q, k, v] = tensors(device, 1000)?;
    let slopes = (values(&[8], 7, DType::F32, device)? * 0.03)?;
    let sinks = Var::from_tensor(&values(&[8], 4, DType::F32, device)?)?;
    let attention = FlashAttn::new().causal().softcap(20.0).alibi_slopes(&slopes).sinks(&sinks);
    let attention = attention.determinism(Determinism::Exact);
    let run = || -> Result<Vec<Vec<f32>>> {
        let q = Var::from_tensor(&q)?;
        let (o, lse) = attention.forward_with_lse(&q, &k, &v)?;
        let loss = (o.to_dtype(DType::F32)?.sqr()?.sum_all()? + lse.sum_all()?)?;
        let gradients = loss.backward()?;
        let gradient = |of: &Var| flat(gradients.get(of).expect("a gradient"));
        Ok(vec![flat(&o)?, flat(&lse)?, gradient(&q)?, gradient(&sinks)?])
    };
    let first = run()?;
    for index in 1..10 {
        if run()? != first {
            return Ok(Err(format!("run {index} differs")));
        }
    }
    Ok(Ok("10 runs".to_owned()))
}

/// Slopes and sinks that are not on the device of Q.
fn other_device(device: &Device) -> Result<Outcome> {
    let [q, k, v] = tensors(device, 20)?;
    let wrong = Tensor::zeros(8, DType::F32, &Device::Cpu)?;
    for (name, attention) in
        [("alibi_slopes", FlashAttn::new().alibi_slopes(&wrong)), ("sinks", FlashAttn::new().sinks(&wrong))]
    {
        match attention.forward(&q, &k, &v) {
            Err(error) if error.to_string().starts_with(&format!("{name} is on Cpu")) => {}
            other => return Ok(Err(format!("{name}: {:?}", other.map(|o| o.shape().clone())))),
        }
    }
    Ok(Ok(String::new()))
}

/// The CPU drops the same weights, so results differ by rounding alone.
fn dropout(device: &Device) -> Result<Outcome> {
    let attention = FlashAttn::new().causal().dropout(Dropout { p: 0.25, seed: 3, offset: 5 });
    let gpu = with_gradients(&attention, &tensors(device, 100)?)?;
    let cpu = with_gradients(&attention, &tensors(&Device::Cpu, 100)?)?;
    let apart = |(a, b): (&Vec<f32>, &Vec<f32>)| {
        let worst = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        worst / b.iter().map(|b| b.abs()).fold(0.0, f32::max)
    };
    let worst = gpu.iter().zip(&cpu).map(apart).fold(0.0, f32::max);
    Ok(if worst < 0.02 { Ok(format!("{worst:.1e} apart")) } else { Err(format!("{worst} apart")) })
}

/// Threads that share a device, each with its own stream if the device has the thread's default stream.
fn threads(device: &Device) -> Result<Outcome> {
    let attention = FlashAttn::new().causal().determinism(Determinism::Exact);
    let expected = with_gradients(&attention, &tensors(device, 500)?)?;
    let run = || {
        (0..10).all(|_| tensors(device, 500).and_then(|t| with_gradients(&attention, &t)).is_ok_and(|r| r == expected))
    };
    let equal = std::thread::scope(|scope| {
        let threads = [0; 4].map(|_| scope.spawn(run));
        threads.into_iter().all(|thread| thread.join().unwrap_or(false))
    });
    Ok(if equal { Ok("4 threads".to_owned()) } else { Err("results differ".to_owned()) })
}

fn nothing(device: &Device) -> Result<Outcome> {
    // candle allocates no memory of size 0, but takes a part of that size.
    let zeros = |seqlen, heads| Tensor::zeros((2, 70, heads, 64), DType::BF16, device)?.narrow(1, 0, seqlen);
    let o = flash_attn(&zeros(0, 4)?, &zeros(70, 4)?, &zeros(70, 4)?, 1.0, false)?;
    let attention = FlashAttn::new();
    let (without_keys, lse) = attention.forward_with_lse(&zeros(5, 4)?, &zeros(0, 2)?, &zeros(0, 2)?)?;
    let right = o.dims() == [2, 0, 4, 64]
        && flat(&without_keys)?.iter().all(|&o| o == 0.0)
        && flat(&lse)?.iter().all(|&lse| lse == f32::NEG_INFINITY);
    Ok(if right { Ok(String::new()) } else { Err("wrong values".to_owned()) })
}

/// Compares the speed with candle's own operations, at B 2, S 4096, 16 query heads over 4 key heads, D 128, bf16,
/// causal.
fn speed(device: &Device) -> Result<Outcome> {
    const S: usize = 4096;
    let make =
        |heads, seed| Var::from_tensor(&values(&[2, S, heads, 128], seed, DType::BF16, device)?.to_dtype(DType::BF16)?);
    let (q, k, v, weights) = (make(16, 1)?, make(4, 2)?, make(4, 3)?, make(16, 4)?);
    let weights = weights.as_detached_tensor();
    let scale = 1.0 / 128f32.sqrt();
    let hidden = eager::live(S, S, Mask::Causal, device)?;
    let hidden = ((hidden - 1.)? * 1e9)?.to_dtype(DType::BF16)?;

    let own = |q: &Tensor, k: &Tensor, v: &Tensor, inference: bool| -> Result<Tensor> {
        let q = (q.transpose(1, 2)?.contiguous()? * f64::from(scale))?;
        let scores = q.matmul(&eager::repeated(k, 16)?.t()?)?.broadcast_add(&hidden)?;
        let weights = if inference { softmax_last_dim(&scores)? } else { softmax(&scores, 3)? };
        weights.matmul(&eager::repeated(v, 16)?)?.transpose(1, 2)
    };
    let flash = |q: &Tensor, k: &Tensor, v: &Tensor, _: bool| flash_attn(q, k, v, scale, true);
    type Attention<'a> = &'a dyn Fn(&Tensor, &Tensor, &Tensor, bool) -> Result<Tensor>;
    let forward = |attention: Attention| -> Result<()> {
        let of = |variable: &Var| variable.as_detached_tensor();
        attention(&of(&q), &of(&k), &of(&v), true).map(drop)
    };
    let both = |attention: Attention| -> Result<()> {
        (attention(&q, &k, &v, false)? * &weights)?.sum_all()?.backward().map(drop)
    };

    let flash_forward = milliseconds(device, 100, || forward(&flash))?;
    let own_forward = milliseconds(device, 5, || forward(&own))?;
    let flash_both = milliseconds(device, 30, || both(&flash))?;
    let own_both = milliseconds(device, 3, || both(&own))?;
    let (times_forward, times_both) = (own_forward / flash_forward, own_both / flash_both);
    let line = format!(
        "forward {flash_forward:.3} ms, candle {own_forward:.1} ms: {times_forward:.0} times; forward and backward \
         {flash_both:.3} ms, candle {own_both:.1} ms: {times_both:.0} times"
    );
    Ok(if times_forward.min(times_both) >= SPEEDUP { Ok(line) } else { Err(line) })
}

/// Returns the smallest mean time of a call in three rounds, after one that warms up.
fn milliseconds(device: &Device, calls: u32, call: impl Fn() -> Result<()>) -> Result<f64> {
    let mut best = f64::INFINITY;
    for round in 0..4 {
        device.synchronize()?;
        let start = Instant::now();
        for _ in 0..calls {
            call()?;
        }
        device.synchronize()?;
        if round > 0 {
            best = best.min(start.elapsed().as_secs_f64() * 1e3 / f64::from(calls));
        }
    }
    Ok(best)
}
