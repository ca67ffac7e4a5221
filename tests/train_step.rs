//! Tests of the training example: a layer learns through `Attention::forward` and `Attention::backward`, and the
//! gradients that it learns from are the loss's.

use ferroflash::Cpu;
use rand::{SeedableRng, rngs::StdRng};

#[path = "../examples/train_step.rs"]
#[allow(dead_code)]
mod train_step;

use train_step::{Layer, VALUES, batch, train};

/// Without attention, the loss stays at ln(values), 2.77, because a question alone does not determine its answer.
/// Uniform attention at most reveals how often a sequence has each value, which saves about 0.1.
#[test]
fn a_layer_learns_to_recall() {
    let score = train(&Cpu, 200).unwrap();
    let guess = (VALUES as f32).ln();
    assert!(score.loss < guess / 10.0, "{score:?}; guessing gives {guess}");
    assert!(score.accuracy > 0.9, "{score:?}");
}

/// Along each gradient, the loss changes by the gradient's norm, measured by central differences. The distance is long
/// enough for the change to exceed the rounding to bf16, and short enough for the loss to be nearly quadratic.
#[test]
fn gradients_are_those_of_the_loss() {
    const DISTANCE: f32 = 0.8;
    let mut rng = StdRng::seed_from_u64(2);
    let tokens = batch(&mut rng);
    let mut layer = Layer::new(&mut rng);
    // The attention of new weights is nearly uniform, so Wq and Wk hardly matter. With larger ones it is not.
    layer.wq.value.iter_mut().chain(&mut layer.wk.value).for_each(|w| *w *= 3.0);
    layer.gradients(&Cpu, &tokens).unwrap();
    let gradients = layer.weights().map(|weights| weights.gradient.clone());
    for (i, (name, gradient)) in ["embedding", "Wq", "Wk", "Wv", "Wo"].into_iter().zip(gradients).enumerate() {
        let norm = gradient.iter().map(|g| g * g).sum::<f32>().sqrt();
        let mut loss_at = |distance: f32| {
            let before = layer.weights()[i].value.clone();
            layer.weights()[i].value.iter_mut().zip(&gradient).for_each(|(w, g)| *w += distance / norm * g);
            let score = layer.gradients(&Cpu, &tokens).unwrap();
            layer.weights()[i].value = before;
            score.loss
        };
        let slope = (loss_at(DISTANCE) - loss_at(-DISTANCE)) / (2.0 * DISTANCE);
        println!("{name}: slope {slope}, gradient's norm {norm}");
        assert!((slope / norm - 1.0).abs() < 0.05, "{name}: slope {slope}, gradient's norm {norm}");
    }
}
