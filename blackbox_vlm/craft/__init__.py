"""CraFT: collaborative fine-tuning of a black-box vision-language model.

Wang, Liang, He, Wang, Tan: "Connecting the Dots: Collaborative Fine-tuning for Black-Box
Vision-Language Models", ICML 2024, arXiv 2402.04050; its public code is mrflogs/CraFT.

    prompts.py   prompt generation           p = p0 + A z                                    (1)
    refine.py    prediction refinement       Y_O = Y_I + g(Y_I)                              (2)
                 fitness of a prompt         L_I = CE(Y_I, y) + w KL(Y_O || Y_I)             (3)
                 loss of the refiner         L_O = CE(Y_O, y) + w KL(Y_I || Y_O)             (4)
    cma.py       the derivative-free optimiser of z
    craft.py     the collaborative algorithm: one generation of (3), one epoch of (4), repeat
    recipes.py   the settings: ours, and the published ones
    guard.py     which of the two modules to deploy, decided out-of-fold (ours)
    state.py     where a run stands, as bytes

The equations are what the public code computes; the numbers are this package's own, not the
paper's. Everything here is pure: it asks for scores and updates a state, and knows no endpoint, no
file and no budget.
"""
