//! Ring of K and V on the CPU: the GPU's protocol, checked at every step.

use std::vec::Vec;

use crate::pipeline::order::KvTile;
use crate::pipeline::ring::Position;

/// Violation of the pipeline's protocol by a kernel. On the GPU it would be a hang or a wrong result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The consumer waits for more tiles than the producer sends.
    WaitWithoutLoad { slot: u32 },
    /// The consumer waits for a slot that it holds itself.
    WaitWithoutRelease { slot: u32 },
    /// A product reads a slot that holds another tile, or that was released.
    WrongTile { slot: u32, holds: Option<KvTile> },
    /// The consumer releases a slot that it does not hold.
    ReleaseWithoutWait { slot: u32 },
    /// The consumer waits for query rows that it has not requested.
    QueryWithoutLoad,
    /// The CTA ended with tiles that no consumer waited for, or slots that were not released.
    Unfinished,
}

impl Fault {
    pub(super) fn raise(self) -> ! {
        panic!("pipeline fault: {self:?}")
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Empty,
    Full(KvTile),
    /// Tile that the consumer has waited for.
    Held(KvTile),
}

/// Slots of the ring, the positions of both ends, and the tiles still to be loaded.
pub struct Ring<I> {
    slots: Vec<(State, Vec<f32>)>,
    loads: I,
    producer: Position,
    consumer: Position,
}

impl<I: Iterator<Item = KvTile>> Ring<I> {
    pub fn new(stages: u32, slot_len: usize, loads: I) -> Self {
        Ring {
            slots: (0..stages).map(|_| (State::Empty, std::vec![0.0; slot_len])).collect(),
            loads,
            producer: Position::PRODUCER,
            consumer: Position::CONSUMER,
        }
    }

    /// Fills every empty slot with the producer's next tiles, then takes the consumer's next slot.
    pub fn wait(&mut self, mut load: impl FnMut(KvTile, &mut [f32])) -> u32 {
        let stages = self.slots.len() as u32;
        while let (State::Empty, data) = &mut self.slots[self.producer.slot as usize] {
            let Some(tile) = self.loads.next() else { break };
            load(tile, data);
            self.slots[self.producer.slot as usize].0 = State::Full(tile);
            self.producer.advance(stages);
        }
        let slot = self.consumer.slot;
        let state = &mut self.slots[slot as usize].0;
        match *state {
            State::Full(tile) => *state = State::Held(tile),
            State::Held(_) => Fault::WaitWithoutRelease { slot }.raise(),
            State::Empty => Fault::WaitWithoutLoad { slot }.raise(),
        }
        self.consumer.advance(stages);
        slot
    }

    /// Releases a slot.
    pub fn release(&mut self, slot: u32) {
        match &mut self.slots[slot as usize].0 {
            state @ State::Held(_) => *state = State::Empty,
            _ => Fault::ReleaseWithoutWait { slot }.raise(),
        }
    }

    /// Returns a held tile of a pair's K, transposed: k-major rows of block_n columns.
    pub fn k(&self, slot: u32, pair: u32) -> &[f32] {
        match &self.slots[slot as usize] {
            (State::Held(KvTile::K(block)), data) if block.pair == pair => data,
            (state, _) => Fault::WrongTile { slot, holds: state.tile() }.raise(),
        }
    }

    /// Returns a held tile of V: block_n rows of head_dim columns.
    pub fn v(&self, slot: u32) -> &[f32] {
        match &self.slots[slot as usize] {
            (State::Held(KvTile::V(_)), data) => data,
            (state, _) => Fault::WrongTile { slot, holds: state.tile() }.raise(),
        }
    }

    /// Checks that every tile was loaded, waited for and released.
    pub fn finish(&mut self) {
        if self.loads.next().is_some() || self.slots.iter().any(|(state, _)| *state != State::Empty) {
            Fault::Unfinished.raise();
        }
    }
}

impl State {
    fn tile(self) -> Option<KvTile> {
        match self {
            State::Held(tile) => Some(tile),
            State::Empty | State::Full(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ground::places::KvBlock;
    use crate::pipeline::order::KvOrder;

    fn ring() -> Ring<impl Iterator<Item = KvTile>> {
        ring_of(1)
    }

    fn ring_of(blocks: u32) -> Ring<impl Iterator<Item = KvTile>> {
        let blocks = (0..blocks).map(|n_block| KvBlock { batch: 0, head: 0, n_block, pair: 0 });
        Ring::new(2, 1, KvOrder::new(blocks).flatten())
    }

    #[test]
    fn a_whole_run_passes() {
        let mut ring = ring();
        let k = ring.wait(|_, _| {});
        ring.k(k, 0);
        ring.release(k);
        let v = ring.wait(|_, _| {});
        ring.v(v);
        ring.release(v);
        ring.finish();
    }

    #[test]
    #[should_panic = "WaitWithoutLoad"]
    fn waiting_for_too_much() {
        let mut ring = ring();
        for _ in 0..3 {
            let slot = ring.wait(|_, _| {});
            ring.release(slot);
        }
    }

    #[test]
    #[should_panic = "WaitWithoutRelease"]
    fn waiting_for_a_held_slot() {
        let mut ring = ring_of(2);
        for _ in 0..3 {
            ring.wait(|_, _| {});
        }
    }

    #[test]
    #[should_panic = "WrongTile"]
    fn reading_v_as_k() {
        let mut ring = ring();
        let k = ring.wait(|_, _| {});
        ring.v(k);
    }

    #[test]
    #[should_panic = "WrongTile"]
    fn reading_the_other_pair() {
        let mut ring = ring();
        let k = ring.wait(|_, _| {});
        ring.k(k, 1);
    }

    #[test]
    #[should_panic = "WrongTile"]
    fn reading_after_release() {
        let mut ring = ring();
        let k = ring.wait(|_, _| {});
        ring.release(k);
        ring.k(k, 0);
    }

    #[test]
    #[should_panic = "ReleaseWithoutWait"]
    fn releasing_twice() {
        let mut ring = ring();
        let k = ring.wait(|_, _| {});
        ring.release(k);
        ring.release(k);
    }

    #[test]
    #[should_panic = "Unfinished"]
    fn leaving_a_tile_behind() {
        let mut ring = ring();
        let k = ring.wait(|_, _| {});
        ring.release(k);
        ring.finish();
    }
}
