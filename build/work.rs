//! Work on all cores: independent jobs, started in their order.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

/// Runs `job` on every item and returns the results in the items' order, or the first error.
///
/// # Errors
/// The error of the first item that has one. Jobs that have not started when an error is known are left out.
pub fn each<T: Sync, R: Send>(items: &[T], job: impl Fn(&T) -> Result<R, String> + Sync) -> Result<Vec<R>, String> {
    let next = AtomicUsize::new(0);
    let results: Vec<Mutex<Option<Result<R, String>>>> = items.iter().map(|_| Mutex::new(None)).collect();
    let work = || {
        while let Some(index) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|&index| index < items.len()) {
            let result = job(&items[index]);
            if result.is_err() {
                next.store(items.len(), Ordering::Relaxed);
            }
            *results[index].lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
        }
    };
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from).min(items.len()) {
            scope.spawn(work);
        }
    });
    results.into_iter().filter_map(|result| result.into_inner().unwrap_or_else(PoisonError::into_inner)).collect()
}

#[cfg(test)]
mod tests {
    use super::each;

    #[test]
    fn results_keep_their_order_and_errors_end_the_work() {
        let items: Vec<u32> = (0..100).collect();
        assert_eq!(each(&items, |&item| Ok(2 * item)).unwrap(), items.iter().map(|item| 2 * item).collect::<Vec<_>>());
        let failed = each(&items, |&item| if item < 7 { Ok(item) } else { Err(format!("{item} fails")) });
        assert!(failed.unwrap_err().ends_with("fails"));
        assert_eq!(each(&[] as &[u32], |&item| Ok(item)).unwrap(), []);
    }
}
