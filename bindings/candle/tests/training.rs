//! A small model learns as it does with candle's own operations.

mod common;

use candle_core::{DType, Device};
use common::training::{Kind, compare, train};

#[test]
fn the_loss_falls_as_it_does_without_ferroflash() {
    let eager = train(&Device::Cpu, Kind::Eager).unwrap();
    for dtype in [DType::BF16, DType::F16] {
        let flash = train(&Device::Cpu, Kind::Flash(dtype)).unwrap();
        println!("{dtype:?}: {} to {}, without {} to {}", flash[0], flash[49], eager[0], eager[49]);
        compare(&eager, &flash).unwrap();
    }
}
